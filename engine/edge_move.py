"""Blocks from another worker's pool into this one's: `move(keys, from, to)`, asked of the worker they go to.

    match at the source (pinned there) -> read -> verify our copy -> begin, write, commit in our own pool ->
    release

By an ordinary transport: in process, or gRPC to the source's edge server. A frame is made when a block leaves
the source's pool; its checksum, identity, epoch, quality and place in the chain are checked before it enters
ours. The source keeps what it has, so readers there notice nothing. Running sequences come first at both
ends: only idle blocks make room. What does not verify, is gone or finds no room ends the run, with its
reason; whatever fails costs only misses. Memory: `BATCH_BLOCKS` frames at a time.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, NamedTuple

import structlog

from engine.edge import LEASE_S, EdgeShard
from kvstore.closing import closing
from kvstore.deadline import Deadline
from kvstore.errors import ConfigError, CorruptBlock, KVStrataError
from kvstore.frame import HEADER_NBYTES, LOSSLESS_CODEC, Frame, decode_frame, verify_identity
from kvstore.nouns import (
    ROOT_KEY,
    BlockKey,
    BlockMeta,
    BlockRef,
    LeaseId,
    MissReason,
    NamespaceId,
    Quality,
    Refusal,
    Snapshot,
)
from kvstore.tiers.copying import beside_the_loop
from kvstore.transport.base import REQUEST_ID_NBYTES, BlockOffer, ReadItem, ShardTransport

__all__ = ["Pulled", "pull"]

BATCH_BLOCKS: Final = 16
RELEASE_TIMEOUT_S: Final = 5.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Pulled:
    """`held` blocks were here, `blocks` came; `misses` counts the others by the reason their run ended: a
    MissReason's value, or a Refusal's."""

    held: int = 0
    blocks: int = 0
    misses: Counter[str] = field(default_factory=Counter)


class _Arrived(NamedTuple):
    meta: BlockMeta
    frame: memoryview


async def pull(
    edge: EdgeShard,
    source: ShardTransport,
    namespace: NamespaceId,
    tenant: str,
    keys: Sequence[BlockKey],
    *,
    timeout_s: float,
) -> Pulled:
    """The first of `keys` (a chain from its first block on) that `source` has and we lack. Raises what
    `EdgeShard.open` raises for our own pool, and ConfigError if that is lossy: a block keeps its frame's name
    on this way, and would not be what it says."""
    if edge.kv_quality is not Quality.LOSSLESS:
        raise ConfigError(
            f"this pool holds KV as {edge.kv_quality.name}: it takes blocks from the store, not from pools"
        )
    edge.open(namespace, tenant)
    move = _Move(edge, source, Snapshot(namespace, edge.epoch, edge.min_quality), keys, Deadline(timeout_s))
    try:
        await move.run()
    except KVStrataError as error:
        log.warning("moving blocks broke off", source=source.shard, error=str(error))
        move.ended_by = move.ended_by or MissReason.SHARD_UNAVAILABLE.value
    finally:
        await move.let_go()
    left = len(keys) - move.pulled.held - move.pulled.blocks
    if left:
        move.pulled.misses[move.ended_by or MissReason.ABSENT.value] += left
    edge.counters["edge:pulled"] += move.pulled.blocks
    for reason, blocks in move.pulled.misses.items():
        edge.counters[f"edge:not_pulled_{reason}"] += blocks
    return move.pulled


class _Move:
    """One run of it. What it pinned, here and there, stands in `_leases` and `_remote`."""

    def __init__(
        self,
        edge: EdgeShard,
        source: ShardTransport,
        snapshot: Snapshot,
        keys: Sequence[BlockKey],
        deadline: Deadline,
    ) -> None:
        self.pulled = Pulled()
        self.ended_by: str | None = None
        self._edge = edge
        self._begun_at = edge.forgotten
        self._source = source
        self._snapshot = snapshot
        self._keys = keys
        self._deadline = deadline
        self._owner = f"move to {edge.driver.shard}"
        self._leases: list[LeaseId] = []
        self._remote: LeaseId | None = None

    async def run(self) -> None:
        driver, left = self._edge.driver, self._deadline.left
        here = await driver.match(self._snapshot, self._keys, self._owner, LEASE_S, timeout_s=left())
        self.pulled.held = first = len(here.slots)
        if here.lease is not None:
            self._leases.append(here.lease)
        if first == len(self._keys):
            return
        there = await self._source.match(self._snapshot, self._keys, self._owner, LEASE_S, timeout_s=left())
        self._remote = there.lease
        self.ended_by = there.miss.value if there.miss is not None else None
        incarnation = there.revision.incarnation
        places = [*zip(there.slots, there.generations, strict=True)][first:]
        refs = [BlockRef(self._source.shard, incarnation, *place) for place in places]
        for begin in range(0, len(refs), BATCH_BLOCKS):
            batch = refs[begin : begin + BATCH_BLOCKS]
            arrived = await self._read(first + begin, batch)
            if self._begun_at != self._edge.forgotten:  # what was read may have been deleted since
                self.ended_by = MissReason.ABSENT.value
                return
            landed = await self._land(arrived)
            self.pulled.blocks += landed
            if landed < len(batch):
                return

    async def let_go(self) -> None:
        """One use of the whole chain here; the source's pins end by themselves if it does not answer."""
        self._edge.driver.core.release(self._leases)
        self._edge.driver.reap()
        if self._remote is not None:
            with suppress(KVStrataError):
                await self._source.release([self._remote], timeout_s=RELEASE_TIMEOUT_S)

    async def _read(self, first: int, refs: Sequence[BlockRef]) -> list[_Arrived]:
        arrived: list[_Arrived] = []
        reading = self._source.read(self._snapshot.namespace, refs, timeout_s=self._deadline.left())
        async with closing(reading) as items:
            async for item in items:
                checked = await self._verify(first + item.index, item)
                if isinstance(checked, MissReason):
                    self.ended_by = checked.value
                    self._edge.counters[f"edge:rejected_{checked.value}"] += item.miss is None
                    break
                arrived.append(checked)
        return arrived

    async def _verify(self, index: int, item: ReadItem) -> _Arrived | MissReason:
        data = item.frame
        if data is None:
            return item.miss or MissReason.ABSENT
        try:
            frame, _ = await beside_the_loop(data.nbytes, lambda: decode_frame(data))
        except CorruptBlock as error:
            return error.reason
        return self._judge(index, frame) or _Arrived(frame.meta, data)

    def _judge(self, index: int, frame: Frame) -> MissReason | None:
        layout, key = self._edge.spec.layout, self._keys[index]
        reason = verify_identity(frame, self._snapshot, key, layout.fingerprint)
        if reason is not None:
            return reason
        parent = self._keys[index - 1] if index else ROOT_KEY
        if (frame.meta.parent, frame.meta.chain_index) != (parent, index):
            return MissReason.OTHER_KEY
        whole = frame.codec == LOSSLESS_CODEC and frame.payload_nbytes == layout.block_nbytes
        return None if whole else MissReason.OTHER_LAYOUT

    async def _land(self, arrived: Sequence[_Arrived]) -> int:
        """Commit what came, as far as there is room; how many blocks of the chain are here by it."""
        async with self._edge.arriving:
            spare = self._edge.spare(len(arrived))
            if spare < len(arrived):
                self.ended_by = Refusal.NO_SPACE.value
            landed = 0
            try:
                for _, group in groupby(arrived[:spare], key=lambda one: one.meta.quality):
                    blocks = [*group]
                    here = await self._commit(blocks)
                    landed += here
                    if here < len(blocks):
                        break
            finally:
                self._edge.tier.put_back()
        return landed

    async def _commit(self, blocks: Sequence[_Arrived]) -> int:
        driver, left = self._edge.driver, self._deadline.left
        metas = [block.meta for block in blocks]
        opened = await driver.begin(
            self._snapshot.namespace,
            self._snapshot.epoch,  # not the pool's of now: the weights may have changed since
            metas[0].quality,
            [BlockOffer(m.key, m.parent, m.chain_index, m.placement, self._edge.frame_nbytes) for m in metas],
            self._owner,
            LEASE_S,
            secrets.token_bytes(REQUEST_ID_NBYTES),
            timeout_s=left(),
        )
        try:
            self._edge.lies_here(opened.txn)
            granted = [
                (i, bytes(block.frame[:HEADER_NBYTES]), block.frame[HEADER_NBYTES:])
                for i, block in enumerate(blocks)
                if opened.outcomes[i] is None
            ]
            await driver.write(opened.txn, granted, timeout_s=left())
            committed = await driver.commit(opened.txn, LEASE_S, timeout_s=left())
        except BaseException:
            await driver.abort(opened.txn, timeout_s=RELEASE_TIMEOUT_S)
            raise
        if committed.lease is not None:
            self._leases.append(committed.lease)
        for i, answer in enumerate(committed.blocks):
            if isinstance(answer, Refusal):
                self.ended_by = answer.value
                return i
        return len(blocks)
