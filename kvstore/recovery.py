"""A shard's start over a tier that survives: what it knew, then what it held."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Final

import structlog

from kvstore.core.shard import ShardCore
from kvstore.core.state import Namespace
from kvstore.errors import KVStrataError
from kvstore.notes import Notes
from kvstore.nouns import BlockMeta, NamespaceId
from kvstore.tiers.base import place_of
from kvstore.tiers.durable import AdvanceNote, EpochNote, NamespaceNote, Recovered, RecoveredBlock
from kvstore.tiers.hierarchy import Tiers

BLOCKS_A_TURN: Final = 64
"""Restored between two turns of the event loop: about 6 ms."""

log = structlog.get_logger(__name__)


async def recover(core: ShardCore, tiers: Tiers, notes: Notes) -> None:
    """Replay the notes, then give each block that is worth it a slot. Raises OSError, ConfigError."""
    assert tiers.durable is not None, "nothing survives without a tier that does"
    recovered = await tiers.durable.recover()
    _replay(core, recovered)
    notes.replayed(recovered.notes)
    found: Counter[str] = Counter(recovered.counters)
    slots_max = core.config.limits.slots_max
    blocks = _newest(recovered.blocks, core.index.nvme.capacity_nbytes, slots_max)
    found["crowded_out"] = len(recovered.blocks) - len(blocks)
    for number, block in enumerate(blocks):
        if number % BLOCKS_A_TURN == 0:
            await asyncio.sleep(0)
        ref = core.restore(block.frame.meta, block.nbytes)
        found["restored" if ref is not None else "not_restored"] += 1
        if ref is not None:
            place = place_of(ref)
            tiers.durable.adopt(block.record, place)
            tiers.host.leave(place)
    if found := +found:  # without what was not found
        core.counters.update({f"recovery:{name}": count for name, count in found.items()})
        log.info("recovered", shard=core.config.shard, **found)


def _newest(blocks: Sequence[RecoveredBlock], nbytes_max: int, blocks_max: int) -> list[RecoveredBlock]:
    """What was given up and not yet overwritten is found too: it must not take the place of what came after.

    Of each version the last copy; oldest first, as they were written and are to go."""
    chosen: dict[BlockMeta, RecoveredBlock] = {}
    nbytes = 0
    for block in reversed(blocks):
        if len(chosen) == blocks_max:
            break
        if block.frame.meta not in chosen and nbytes + block.nbytes <= nbytes_max:
            chosen[block.frame.meta] = block
            nbytes += block.nbytes
    return list(reversed(chosen.values()))


def _replay(core: ShardCore, recovered: Recovered) -> None:
    """A note that makes no sense any more (limits were lowered since) costs the blocks that need it."""
    for note in recovered.notes:
        try:
            match note:
                case NamespaceNote(namespace_id, model_id, tenant, layout):
                    core.open_namespace(NamespaceId(namespace_id), Namespace(model_id, layout, tenant))
                case EpochNote(model_id, epoch):
                    core.register_epoch(model_id, epoch)
                case AdvanceNote(model_id, number, policy):
                    core.advance_epoch(model_id, number, policy)
        except KVStrataError as error:
            core.counters["recovery:notes_refused"] += 1
            log.warning("a note was not replayed", shard=core.config.shard, note=repr(note), why=str(error))
