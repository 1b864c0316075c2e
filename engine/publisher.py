"""Publishing: completed blocks go to the store while the engine computes the next ones.

    engine step -> offer(block) -> [pending, bounded in bytes] -> one publish at a time a sequence -> pins

`offer` never waits. Beyond `inflight_nbytes_max` a block is dropped and counted, and with it the rest of its
sequence: nobody could reach a block behind a gap. A sequence whose lineage forbids it publishes nothing.
A publish that has begun is never cancelled (its pins would be nobody's): it ends within `timeout_s`, and pins
that nobody waits for any more are released as they come.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

import structlog

from engine.background import Background
from engine.parallel.session import Session
from engine.store_link import StoreLink
from engine.types import CompletedBlock
from kvstore.answers import PublishBlock, Published
from kvstore.errors import KVStrataError
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import LeaseId, PinnedBlock, Refusal, ShardId

__all__ = ["Publication", "PublishLimits", "Publisher"]

log = structlog.get_logger(__name__)

_STILL_REACHABLE: Final = frozenset({Refusal.EXISTS, Refusal.STAGED})
"""Refusals behind which the chain goes on: somebody else has stored the block, or is about to."""


@dataclass(frozen=True, slots=True)
class PublishLimits:
    inflight_nbytes_max: int = 256 << 20
    batch_blocks_max: int = 32
    concurrent_max: int = 8  # publishes at one time, over all sequences
    timeout_s: float = 10.0


class Publisher:
    """One worker's. `counters`: "publish:" blocks, dropped, withheld, refused."""

    def __init__(self, store: StoreLink, background: Background, limits: PublishLimits) -> None:
        self.counters: Counter[str] = Counter()
        self.inflight_nbytes = 0
        self.limits = limits
        self.store = store
        self.background = background
        self.slots = asyncio.Semaphore(limits.concurrent_max)

    def open(
        self,
        session: Session | None,
        chain: KeyChain,
        lineage: Lineage,
        *,
        owner: str,
        pin_for_s: float | None,
    ) -> Publication:
        """A sequence's publication. `chain` is the caller's, who extends it as tokens come."""
        return Publication(self, session, chain, lineage, owner, pin_for_s)


class Publication:
    """Blocks of one sequence on their way. `pins[i]` is chain block i, readable and pinned."""

    def __init__(
        self,
        publisher: Publisher,
        session: Session | None,
        chain: KeyChain,
        lineage: Lineage,
        owner: str,
        pin_for_s: float | None,
    ) -> None:
        self.pins: dict[int, PinnedBlock] = {}
        self.leases: list[tuple[ShardId, LeaseId]] = []
        self.left_to_others = False  # another was writing a block that was offered: it is not pinned
        self._publisher = publisher
        self._session = session
        self._chain = chain
        self._quality = lineage.publishable
        self._owner = owner
        self._pin_for_s = pin_for_s
        self._pending: deque[CompletedBlock] = deque()
        self._gap = False
        self._withheld = False
        self._task: asyncio.Task[None] | None = None

    def offer(self, block: CompletedBlock) -> None:
        """Take a block that became full, or drop it and say so in the counters. Never waits."""
        publisher, nbytes = self._publisher, block.payload.nbytes
        if self._session is None or self._quality is None or self._withheld:
            publisher.counters["publish:withheld"] += 1
        elif self._gap or publisher.inflight_nbytes + nbytes > publisher.limits.inflight_nbytes_max:
            self._gap = True
            publisher.counters["publish:dropped"] += 1
        else:
            publisher.inflight_nbytes += nbytes
            self._pending.append(block)
            if self._task is None or self._task.done():
                draining = self._drain(self._session)
                self._task = publisher.background.spawn(draining, f"publish {self._owner}")

    def withhold(self) -> None:
        """The sequence goes on under other weights: what it offers from here on is nobody's. What was offered
        before is published as it was meant."""
        self._withheld = True

    def discard(self) -> None:
        """Its KV may be damaged: nothing is published that is not on its way to the store yet."""
        self._withheld = self._gap = True

    async def settle(self, timeout_s: float) -> bool:
        """Wait for what was offered. False: the time was up; it goes on in the background."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)
        return self._task is None or self._task.done()

    def take_leases(self) -> tuple[tuple[ShardId, LeaseId], ...]:
        """The pins' leases, the caller's from here on. What is published later is not pinned."""
        taken, self.leases = tuple(self.leases), []
        self._pin_for_s = None
        return taken

    def close(self) -> None:
        """Nobody reads the pins: give up those there are and those to come. Publishing goes on."""
        leases = self.take_leases()
        if self._session is not None:
            self._publisher.store.release(self._session, leases)

    async def _drain(self, session: Session) -> None:
        limits = self._publisher.limits
        while self._pending:
            count = min(len(self._pending), limits.batch_blocks_max)
            batch = [self._pending.popleft() for _ in range(count)]
            try:
                await self._publish(session, batch)
            finally:
                self._publisher.inflight_nbytes -= sum(block.payload.nbytes for block in batch)

    async def _publish(self, session: Session, batch: list[CompletedBlock]) -> None:
        assert self._quality is not None, "offer takes nothing from such a lineage"
        blocks = [self._describe(block) for block in batch]
        async with self._publisher.slots:
            if self._gap:
                self._publisher.counters["publish:dropped"] += len(batch)
                return
            pinning = self._pin_for_s is not None
            try:
                published = await session.publish(
                    blocks,
                    quality=self._quality,
                    owner=self._owner,
                    pin_for_s=self._pin_for_s,
                    timeout_s=self._publisher.limits.timeout_s,
                )
            except (KVStrataError, OSError) as error:
                log.warning("publishing failed", owner=self._owner, blocks=len(blocks), error=str(error))
                published = Published((Refusal.SHARD_UNAVAILABLE,) * len(blocks), ())
        self._record(blocks, published)
        if pinning and self._pin_for_s is None:
            self._publisher.store.release(session, published.leases)
        else:
            self.leases += published.leases

    def _record(self, blocks: list[PublishBlock], published: Published) -> None:
        counters = self._publisher.counters
        for block, answer in zip(blocks, published.blocks, strict=True):
            if isinstance(answer, PinnedBlock):
                counters["publish:blocks"] += 1
                self.pins[block.chain_index] = answer
            else:
                counters["publish:refused"] += 1
                self._gap = self._gap or answer not in _STILL_REACHABLE
                self.left_to_others = self.left_to_others or answer is Refusal.STAGED

    def _describe(self, block: CompletedBlock) -> PublishBlock:
        index, chain = block.chain_index, self._chain
        return PublishBlock(
            chain.keys[index], chain.parent(index), index, chain.placement(index), block.payload.data
        )
