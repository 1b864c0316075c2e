"""Onboarding: what a store holds of a sequence's chain, read, verified and ready to admit.

Only the contiguous prefix counts: KV of a block is useless without all that stands before it. The first block
that is absent, corrupt or late ends the run, and everything from there on is recomputed. A wait is bounded,
so the worst a sick store costs is `timeout_s`; it is never an error. Cost: one round trip to match, one
stream a shard to read; payloads are views of the reader's own copies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import cast

import structlog

from engine.background import Background
from engine.parallel.session import Session
from engine.store_link import StoreLink
from kvstore.answers import BlockMiss, Match, VerifiedBlock
from kvstore.errors import KVStrataError
from kvstore.lineage import Lineage
from kvstore.nouns import BlockKey, Epoch, MissReason, PinnedBlock, Quality

__all__ = ["Onboarded", "Onboarding", "misses_of"]

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Onboarded:
    """`payloads[i]` is the i-th block that was asked for, verified, `origins[i]` what it was read as.
    `lineage` has absorbed every one of them."""

    lineage: Lineage
    payloads: list[memoryview] = field(default_factory=list)
    origins: list[tuple[Epoch, Quality]] = field(default_factory=list)
    epochs: set[int] = field(default_factory=set)
    miss: MissReason | None = None  # why it is not all that was asked for

    def take(self, block: VerifiedBlock) -> None:
        self.payloads.append(block.payload)
        self.origins.append((block.epoch, block.quality))
        self.epochs.add(block.epoch.number)
        self.lineage = self.lineage.absorb(block.epoch, block.quality)


class Onboarding:
    """Match and read, bounded, leaving no lease behind when the caller is cancelled."""

    def __init__(self, store: StoreLink, background: Background) -> None:
        self._store = store
        self._background = background

    async def match(
        self,
        session: Session,
        keys: Sequence[BlockKey],
        *,
        owner: str,
        lease_s: float,
        timeout_s: float,
    ) -> Match:
        """The run of `keys` the store holds, pinned. A store that fails is a miss.

        The match itself is never cancelled: its answer may hold pins that only we can name.
        """
        if not keys:
            return Match((), (), None)
        matching = session.match(keys, owner=owner, lease_s=lease_s, timeout_s=timeout_s)
        task = self._background.spawn(_or_miss(matching), f"match for {owner}")
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._background.spawn(self._release_matched(session, task), f"release match of {owner}")
            raise

    async def read(
        self,
        session: Session,
        blocks: Sequence[PinnedBlock],
        lineage: Lineage,
        *,
        timeout_s: float,
    ) -> Onboarded:
        """The contiguous prefix of `blocks` that arrived and verified within `timeout_s`."""
        onboarded = Onboarded(lineage)
        if not blocks:
            return onboarded
        stream = cast(
            AsyncGenerator[VerifiedBlock | BlockMiss, None], session.read(blocks, timeout_s=timeout_s)
        )
        try:
            async with asyncio.timeout(timeout_s), contextlib.aclosing(stream):
                async for answer in stream:
                    if isinstance(answer, BlockMiss):
                        onboarded.miss = answer.reason
                        break
                    onboarded.take(answer)
        except TimeoutError:
            onboarded.miss = MissReason.DEADLINE
        except (KVStrataError, OSError) as error:
            log.warning("reading blocks broke off", error=str(error))
            onboarded.miss = MissReason.SHARD_UNAVAILABLE
        return onboarded

    async def _release_matched(self, session: Session, task: asyncio.Task[Match]) -> None:
        await session.release((await task).leases)


def misses_of(
    asked: int,
    matched: int,
    used: int,
    match: MissReason | None,
    read: MissReason | None,
    gated: int = 0,
) -> Counter[str]:
    """Blocks not served, by the reason their run ended: `used` plus all of these is `asked`. `gated` ones
    were there, and computed because that is cheaper (engine/gate.py).

    >>> misses_of(10, 7, 5, MissReason.ABSENT, MissReason.CHECKSUM)
    Counter({'absent': 3, 'checksum': 2})
    """
    misses: Counter[str] = Counter()
    if asked > matched:
        misses[(match or MissReason.ABSENT).value] += asked - matched
    if gated:
        misses["gated"] += gated
    if matched - gated > used:
        misses[(read or MissReason.DEADLINE).value] += matched - gated - used
    return misses


async def _or_miss(matching: Awaitable[Match]) -> Match:
    try:
        return await matching
    except (KVStrataError, OSError) as error:
        log.warning("match failed", error=str(error))
        return Match((), (), MissReason.SHARD_UNAVAILABLE)
