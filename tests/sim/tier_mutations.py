"""Safeties of moves, of the tier that survives and of recovery, broken on purpose: see test_mutations.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.core.moves import Move, Moves
from kvstore.core.restoring import restore
from kvstore.core.retiring import Retiring
from kvstore.core.shard import ShardCore
from kvstore.mover import Mover
from kvstore.notes import Notes
from kvstore.nouns import BlockMeta, BlockRef, Revision
from kvstore.tiers.durable import AdvanceNote, Note, PurgeNote
from kvstore.tiers.hierarchy import Tiers
from kvstore.transport.base import Purge, Purged
from kvstore.upkeep import Upkeep
from tests.kvstore.tiers.durable_memory import DurableMemory

Patch = pytest.MonkeyPatch


def lands_forbidden(patch: Patch) -> None:
    """An encoded version lands although its key was purged, and so its source."""
    patch.setattr(Moves, "is_wanted", lambda moves, move: move.lease in moves._holds.by_lease)
    patch.setattr("kvstore.core.moves.FORBIDDEN", 0)


def not_discarded(patch: Patch) -> None:
    """What a move wrote for nobody is left where it was written."""

    def end(mover: Mover, move: Move, open_moves: dict[Move, None]) -> None:
        del open_moves[move]
        mover._core.moves.done(move)
        mover._core.index.freed.clear()

    patch.setattr(Mover, "_end", end)


def unverified_moves(patch: Patch) -> None:
    """What is read for a move is believed."""
    patch.setattr("kvstore.mover.is_frame_of", lambda *_: True)


def before_the_sync(patch: Patch) -> None:
    """A version counts as kept as soon as it is written."""

    async def at_once(*_: object) -> None:
        """Nothing is waited for."""

    patch.setattr(DurableMemory, "sync", at_once)


def failed_sync(patch: Patch) -> None:
    """A sync that failed is taken for one that did not."""
    sync = DurableMemory.sync

    async def sync_anyhow(tier: DurableMemory) -> None:
        with contextlib.suppress(OSError):
            await sync(tier)

    patch.setattr(DurableMemory, "sync", sync_anyhow)


def recovers_dropped(patch: Patch) -> None:
    """A recovery forgets which epochs were advanced to, and dropped."""

    async def keep(notes: Notes, note: Note) -> None:
        if not isinstance(note, AdvanceNote):
            await _keep(notes, note)

    patch.setattr(Notes, "keep", keep)


_keep = Notes.keep


def recovers_purged(patch: Patch) -> None:
    """A purge is not noted."""

    async def keep(notes: Notes, note: Note) -> None:
        if not isinstance(note, PurgeNote):
            await _keep(notes, note)

    patch.setattr(Notes, "keep", keep)


def purge_noted_late(patch: Patch) -> None:
    """A purge is noted behind what is written while it is swept."""

    async def purge(upkeep: Upkeep, scope: Purge) -> Purged:
        core = upkeep._core
        core.purge(scope.namespace, scope.keys, scope.epoch)
        upkeep.settle()
        while await upkeep._sweep():
            pass
        await asyncio.sleep(1.0)
        await upkeep._notes.keep(PurgeNote(scope.namespace, scope.keys, scope.epoch))
        return Purged(Revision(core.config.incarnation, core.revision), 0, 0)

    patch.setattr(Upkeep, "purge", purge)


def moves_untold(patch: Patch) -> None:
    """Versions move without saying."""
    patch.setattr(Retiring, "tell_moved", lambda *_: None)


def looked_for_once(patch: Patch) -> None:
    """A reader that finds a version on no tier, since it moves, is told that it is lost."""

    async def once(tiers: Tiers, look: Callable[[Any], Any]) -> Any:
        frame = await look(tiers.host)
        return frame if frame is not None or tiers.durable is None else await look(tiers.durable)

    patch.setattr(Tiers, "_found", once)


def reads_below_alone(patch: Patch) -> None:
    """What left the host is not looked for below."""

    async def above(tiers: Tiers, look: Callable[[Any], Any]) -> Any:
        return await look(tiers.host)

    patch.setattr(Tiers, "_found", above)


def failed_moves_stay(patch: Patch) -> None:
    """A move that failed keeps its room."""

    def failed(moves: Moves, move: Move) -> None:
        moves._end(move)

    patch.setattr(Moves, "failed", failed)


def born_at_nought(patch: Patch) -> None:
    """What is restored is made at revision 0."""

    def at_nought(core: ShardCore, meta: BlockMeta, nbytes: int) -> BlockRef | None:
        return restore(core.index, core.epochs, meta, nbytes, 0)

    patch.setattr(ShardCore, "restore", at_nought)


TIER_MUTATIONS: dict[Callable[[Patch], None], int] = {
    lands_forbidden: 360,
    not_discarded: 20,
    unverified_moves: 30,
    before_the_sync: 20,
    failed_sync: 30,
    recovers_dropped: 20,
    recovers_purged: 60,
    purge_noted_late: 180,
    moves_untold: 20,
    looked_for_once: 30,
    reads_below_alone: 20,
    failed_moves_stay: 100,
    born_at_nought: 20,
}
"""What is broken -> within how many seeds it is found."""
