"""The shards of one client, shared by its sessions, and what their errors mean to a reader or writer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Final

import structlog

from kvstore.errors import (
    DeadlineExceeded,
    EpochConflict,
    EpochUnknown,
    KVStrataError,
    OverLimit,
    Unavailable,
)
from kvstore.nouns import BlockRef, MissReason, Refusal, ShardId
from kvstore.transport.base import ShardTransport

log = structlog.get_logger(__name__)

REPORTS_MAX: Final = 64  # corrupt blocks being reported at one time
REPORT_TIMEOUT_S: Final = 5.0


class Peers:
    """The shards of one client, shared by its sessions."""

    def __init__(
        self,
        weights: Mapping[ShardId, float],
        transports: dict[ShardId, ShardTransport],
        counters: Counter[str],
    ) -> None:
        self.weights = dict(weights)
        self.transports = transports
        self.counters = counters
        self._reports: set[asyncio.Task[None]] = set()

    def replace(self, weights: Mapping[ShardId, float], transports: dict[ShardId, ShardTransport]) -> None:
        self.weights, self.transports = dict(weights), transports

    def transport(self, shard: ShardId) -> ShardTransport:
        """Raises Unavailable for a shard that left the topology."""
        found = self.transports.get(shard)
        if found is None:
            raise Unavailable(f"shard {shard} is not in the topology any more")
        return found

    def report(self, ref: BlockRef) -> None:
        """Tell the shard, in the background, that a block of its failed verification."""
        if len(self._reports) >= REPORTS_MAX:
            self.counters["reports_dropped"] += 1
            return
        task = asyncio.create_task(self._report(ref))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def finish_reports(self) -> None:
        """Wait for what is being reported; each report is bounded by its own deadline."""
        await asyncio.gather(*self._reports)

    async def _report(self, ref: BlockRef) -> None:
        try:
            await self.transport(ref.shard).report([ref], timeout_s=REPORT_TIMEOUT_S)
        except KVStrataError as error:
            self.counters["reports_failed"] += 1
            log.warning("a corrupt block could not be reported", shard=ref.shard, error=str(error))


def miss_of(error: KVStrataError) -> MissReason:
    if isinstance(error, DeadlineExceeded):
        return MissReason.DEADLINE
    return MissReason.SHARD_UNAVAILABLE if isinstance(error, Unavailable) else MissReason.REFUSED


def refusal_of(error: Exception) -> Refusal:
    if isinstance(error, DeadlineExceeded | TimeoutError):
        return Refusal.DEADLINE
    if isinstance(error, EpochUnknown | EpochConflict):
        return Refusal.EPOCH
    return Refusal.NO_SPACE if isinstance(error, OverLimit) else Refusal.SHARD_UNAVAILABLE
