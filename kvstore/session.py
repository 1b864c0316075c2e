"""One namespace at one epoch over all shards: match, read, publish, and the leases in between.

A shard that is down, slow or restarted is a miss with a reason, never an exception. After a restart the
session opens its namespace and registers its epoch there again, once, and retries.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import structlog

from kvstore.answers import BlockMiss, Match, PublishBlock, Published, VerifiedBlock
from kvstore.by_tokens import ByTokens
from kvstore.closing import closing
from kvstore.codecs.frames import decode_payload, why_unreadable
from kvstore.deadline import Deadline
from kvstore.errors import (
    CorruptBlock,
    EpochConflict,
    EpochUnknown,
    KVStrataError,
    NotFound,
    Unavailable,
)
from kvstore.frame import LOSSLESS_CODEC, Frame, decode_frame, verify_identity
from kvstore.matching import Answer, all_of, match_over, parts_of, place
from kvstore.nouns import (
    KEYS_MAX,
    BlockKey,
    BlockRef,
    Epoch,
    KVLayout,
    LeaseId,
    MissReason,
    NamespaceId,
    NamespaceSpec,
    PinnedBlock,
    Quality,
    Refusal,
    ShardId,
    Snapshot,
)
from kvstore.peers import ERRAND_TIMEOUT_S, Peers, miss_of, refusal_of
from kvstore.prefetching import PrefetchMode, PrefetchResult, announce_over, wait_of
from kvstore.publication import Publication
from kvstore.reading import read_into
from kvstore.retention import RetentionRange, check_ranges
from kvstore.tiers.copying import beside_the_loop
from kvstore.transport.base import Announced, ReadItem, ShardTransport

log = structlog.get_logger(__name__)

READ_AHEAD: Final = 4  # frames of one shard that wait for their turn, at most
LEASE_CALL_S: Final = 5.0  # renew and release, on all shards at once

Value = TypeVar("Value")


class StoreSession(ByTokens):
    def __init__(self, peers: Peers, spec: NamespaceSpec, tenant: str, snapshot: Snapshot) -> None:
        self._peers = peers
        self._spec = spec
        self._tenant = tenant
        self._snapshot = snapshot

    @property
    def namespace(self) -> NamespaceId:
        return self._snapshot.namespace

    @property
    def layout(self) -> KVLayout:
        return self._spec.layout

    @property
    def epoch(self) -> Epoch:
        return self._snapshot.epoch

    @property
    def min_quality(self) -> Quality:
        return self._snapshot.min_quality

    async def register(self, timeout_s: float) -> None:
        """Register the epoch on every shard that answers. Raises EpochConflict."""

        async def register(transport: ShardTransport) -> None:
            try:
                await transport.register_epoch(self._spec.model_id, self.epoch, timeout_s=timeout_s)
            except EpochConflict:
                raise
            except KVStrataError as error:
                log.warning("shard not opened yet", shard=transport.shard, error=str(error))

        await asyncio.gather(*(register(t) for t in self._peers.transports.values()))

    # -- reading -----------------------------------------------------------------------------------

    async def match(self, keys: Sequence[BlockKey], *, owner: str, lease_s: float, timeout_s: float) -> Match:
        """The longest prefix run of `keys` (a chain from its first block on) over all shards, pinned."""

        async def ask(shard: ShardId, asked: Sequence[BlockKey], deadline: Deadline) -> Answer:
            return await self._match_on(shard, asked, owner, lease_s, deadline)

        found = await match_over(self._peers.weights, keys, Deadline(timeout_s), ask, self._give_back)
        if found.miss is not None:
            self._peers.counters[f"miss:{found.miss.value}"] += 1
        return found

    async def announce(
        self,
        keys: Sequence[BlockKey],
        *,
        mode: PrefetchMode = "best_effort",
        wait_s: float = 0.0,
        timeout_s: float,
    ) -> PrefetchResult:
        """As `prefetch`, by the keys of a chain from its first block on."""
        wait_s, deadline = wait_of(mode, wait_s, timeout_s), Deadline(timeout_s)

        async def ask(shard: ShardId, mine: Sequence[BlockKey]) -> Announced | None:
            try:
                return await self._retried(
                    shard,
                    lambda t: t.announce(self._snapshot, mine[:KEYS_MAX], wait_s, timeout_s=deadline.left()),
                    deadline,
                )
            except KVStrataError as error:
                self._peers.counters["announce:failed"] += 1
                log.warning("announcement failed", shard=shard, error=str(error))
                return None

        return await announce_over(self._peers.weights, keys, self.layout.block_tokens, ask)

    async def read(
        self, blocks: Sequence[PinnedBlock], *, timeout_s: float
    ) -> AsyncIterator[VerifiedBlock | BlockMiss]:
        """Every block once, in order: verified on our own copy, or the reason it is not served.

        One stream a shard, all at once; at most READ_AHEAD frames of each wait for their turn.
        """
        by_shard: dict[ShardId, list[int]] = defaultdict(list)
        for i, block in enumerate(blocks):
            by_shard[block.ref.shard].append(i)
        deadline = Deadline(timeout_s)
        queues: dict[ShardId, asyncio.Queue[ReadItem | MissReason]] = {
            shard: asyncio.Queue(READ_AHEAD) for shard in by_shard
        }
        tasks = [
            asyncio.create_task(self._stream(shard, [blocks[i].ref for i in mine], queues[shard], timeout_s))
            for shard, mine in by_shard.items()
        ]
        broken: dict[ShardId, MissReason] = {}
        try:
            for i, block in enumerate(blocks):
                shard = block.ref.shard
                if shard not in broken:
                    item = await _next(queues[shard], deadline)
                    if isinstance(item, MissReason):
                        broken[shard] = item
                    else:
                        yield await self._verified(i, block, item)
                        continue
                yield self._missed(i, block, broken[shard])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def read_into(
        self, blocks: Sequence[PinnedBlock], buffers: Sequence[Any], *, timeout_s: float
    ) -> list[VerifiedBlock | BlockMiss]:
        """Payload i into `buffers[i]`: writable bytes, contiguous, of the layout's `block_nbytes`.

        Answers in order, verified in the buffer itself. Where the answer is a `BlockMiss` the buffer's
        content is undefined. Raises ValueError for buffers that do not fit.
        """
        answers, refused = await read_into(
            self._peers, self._snapshot, self.layout, blocks, buffers, timeout_s, self._unexpected
        )
        for block in refused:
            self._report(block.ref)
        return answers

    # -- writing -----------------------------------------------------------------------------------

    async def publish(
        self,
        blocks: Sequence[PublishBlock],
        *,
        quality: Quality,
        owner: str,
        pin_for_s: float | None,
        retention: Sequence[RetentionRange] = (),
        timeout_s: float,
    ) -> Published:
        """Commit the blocks on their shards, in parallel: one transaction for each OFFERS_MAX of a shard.

        `retention` speaks of the tokens of the sequence the blocks are of. Raises ConfigError for too much.
        """
        check_ranges(retention)
        deadline = Deadline(timeout_s)
        parts = parts_of(place([block.placement for block in blocks], self._peers.weights))
        as_what = Publication(
            self.namespace, self.epoch, quality, self.layout, owner, pin_for_s, tuple(retention)
        )
        answers: list[PinnedBlock | Refusal] = [Refusal.SHARD_UNAVAILABLE] * len(blocks)
        leases: list[tuple[ShardId, LeaseId]] = []

        async def publish_on(shard: ShardId, mine: list[int]) -> None:
            chosen = [blocks[i] for i in mine]
            try:
                async with asyncio.timeout_at(deadline.at):
                    found, lease = await self._retried(
                        shard, lambda t: as_what.transact(self._peers, t, chosen, deadline), deadline
                    )
            except (KVStrataError, TimeoutError) as error:
                refusal = refusal_of(error)
                found, lease = [refusal] * len(mine), None
                log.warning("blocks not published", shard=shard, blocks=len(mine), error=str(error))
            for i, answer in zip(mine, found, strict=True):
                answers[i] = answer
            if lease is not None:
                leases.append((shard, lease))

        try:
            await all_of(publish_on(*part) for part in parts)
        except BaseException:
            for shard, lease in leases:
                self._give_back(shard, lease)
            raise
        for answer in answers:
            if isinstance(answer, Refusal):
                self._peers.counters[f"refused:{answer.value}"] += 1
        return Published(tuple(answers), tuple(leases))

    # -- leases ------------------------------------------------------------------------------------

    async def renew(self, leases: Sequence[tuple[ShardId, LeaseId]], lease_s: float) -> bool:
        """Extend all; False when one is gone or its shard does not answer. Bounded by LEASE_CALL_S."""

        async def renew_on(shard: ShardId, mine: list[LeaseId]) -> bool:
            try:
                held = await self._peers.transport(shard).renew(mine, lease_s, timeout_s=LEASE_CALL_S)
            except KVStrataError:
                self._peers.counters["renew:failed"] += 1
                return False
            return all(held)

        return all(await asyncio.gather(*(renew_on(*grouped) for grouped in _by_shard(leases).items())))

    async def release(self, leases: Sequence[tuple[ShardId, LeaseId]]) -> None:
        """Drop leases. One whose shard does not answer within LEASE_CALL_S expires by itself."""

        async def release_on(shard: ShardId, mine: list[LeaseId]) -> None:
            try:
                await self._peers.transport(shard).release(mine, timeout_s=LEASE_CALL_S)
            except KVStrataError:
                self._peers.counters["release:failed"] += 1

        await asyncio.gather(*(release_on(*grouped) for grouped in _by_shard(leases).items()))

    # -- inside ------------------------------------------------------------------------------------

    async def _match_on(
        self, shard: ShardId, keys: Sequence[BlockKey], owner: str, lease_s: float, deadline: Deadline
    ) -> Answer:
        try:
            return await self._retried(
                shard,
                lambda t: t.match(self._snapshot, keys, owner, lease_s, timeout_s=deadline.left()),
                deadline,
            )
        except KVStrataError as error:
            log.warning("match failed", shard=shard, error=str(error))
            return miss_of(error)

    def _give_back(self, shard: ShardId, lease: LeaseId) -> None:
        transport = self._peers.transports.get(shard)
        if transport is not None:
            self._peers.send("release", transport.release([lease], timeout_s=ERRAND_TIMEOUT_S))

    async def _retried(
        self, shard: ShardId, call: Callable[[ShardTransport], Awaitable[Value]], deadline: Deadline
    ) -> Value:
        """Call; if the shard restarted and forgot us, introduce ourselves and call once more.

        An error that is none of our tree is logged, counted, and comes out as Unavailable; a failed assertion
        of this process is let out: it is what simulations look for.
        """
        transport = self._peers.transport(shard)
        try:
            try:
                return await call(transport)
            except (NotFound, EpochUnknown):
                await self._reopen(transport, deadline)
                return await call(transport)
        except (KVStrataError, AssertionError):
            raise
        except Exception as error:
            raise self._unexpected(shard, error) from error

    async def _reopen(self, transport: ShardTransport, deadline: Deadline) -> None:
        self._peers.counters["reopened"] += 1
        opened = await transport.open_namespace(self._spec, self._tenant, timeout_s=deadline.left())
        if opened != self.namespace:
            raise Unavailable(f"shard {transport.shard} restarted with another cluster secret") from None
        await transport.register_epoch(self._spec.model_id, self.epoch, timeout_s=deadline.left())

    def _unexpected(self, shard: ShardId, error: Exception) -> Unavailable:
        """A bug, ours or the shard's, must cost a caller no more than the shard."""
        self._peers.counters["unexpected_errors"] += 1
        log.exception("a shard's call failed in a way it never should", shard=shard)
        return Unavailable(f"shard {shard}: {type(error).__name__}: {error}")

    async def _stream(
        self,
        shard: ShardId,
        refs: list[BlockRef],
        queue: asyncio.Queue[ReadItem | MissReason],
        timeout_s: float,
    ) -> None:
        try:
            reading = self._peers.transport(shard).read(self.namespace, refs, timeout_s=timeout_s)
            async with closing(reading) as items:
                async for item in items:
                    await queue.put(item)
            await queue.put(MissReason.SHARD_UNAVAILABLE)  # only seen if the stream ended too early
        except KVStrataError as error:
            log.warning("read broke off", shard=shard, error=str(error))
            await queue.put(miss_of(error))
        except Exception as error:  # nor may it make the reader wait for what never comes
            await queue.put(miss_of(self._unexpected(shard, error)))

    async def _verified(self, i: int, block: PinnedBlock, item: ReadItem) -> VerifiedBlock | BlockMiss:
        if item.frame is None:
            return self._missed(i, block, item.miss or MissReason.ABSENT)
        try:
            frame, payload = decode_frame(item.frame)
            reason = verify_identity(frame, self._snapshot, block.key, self.layout.fingerprint)
            reason = reason or why_unreadable(frame, self.layout)
            if reason is None and frame.codec != LOSSLESS_CODEC:
                payload = await self._decoded(frame, payload)
        except CorruptBlock as error:
            reason = error.reason
        if reason is not None:
            self._peers.counters[f"rejected:{reason.value}"] += 1
            self._report(block.ref)
            return self._missed(i, block, reason)
        self._peers.counters["verified_blocks"] += 1
        self._peers.counters["read_bytes"] += item.frame.nbytes
        return VerifiedBlock(i, payload, frame.meta.epoch, frame.meta.quality)

    async def _decoded(self, frame: Frame, payload: memoryview) -> memoryview:
        """In memory of its own. Raises CorruptBlock."""
        out = np.empty(self.layout.block_nbytes, dtype=np.uint8).data
        await beside_the_loop(out.nbytes, lambda: decode_payload(frame, payload, self.layout, out))
        self._peers.counters["decoded_blocks"] += 1
        return out

    def _report(self, ref: BlockRef) -> None:
        """A block of the shard's failed verification: let it check its own copy."""
        transport = self._peers.transports.get(ref.shard)
        if transport is not None:
            self._peers.send("report", transport.report(self.namespace, [ref], timeout_s=ERRAND_TIMEOUT_S))

    def _missed(self, i: int, block: PinnedBlock, reason: MissReason) -> BlockMiss:
        self._peers.counters[f"miss:{reason.value}"] += 1
        return BlockMiss(i, block.key, reason)


async def _next(queue: asyncio.Queue[ReadItem | MissReason], deadline: Deadline) -> ReadItem | MissReason:
    try:
        async with asyncio.timeout_at(deadline.at):
            return await queue.get()
    except TimeoutError:
        return MissReason.DEADLINE


def _by_shard(leases: Sequence[tuple[ShardId, LeaseId]]) -> dict[ShardId, list[LeaseId]]:
    grouped: dict[ShardId, list[LeaseId]] = {}
    for shard, lease in leases:
        grouped.setdefault(shard, []).append(lease)
    return grouped
