"""The shards of one client, shared by its sessions, and what their errors mean to a reader or writer."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections import Counter
from collections.abc import Coroutine, Mapping
from typing import Any, Final

import structlog

from kvstore.errors import (
    DeadlineExceeded,
    EpochConflict,
    EpochUnknown,
    KVStrataError,
    LeaseExpired,
    OverLimit,
    Unavailable,
)
from kvstore.nouns import MissReason, Refusal, ShardId
from kvstore.transport.base import ShardTransport

log = structlog.get_logger(__name__)

ERRANDS_MAX: Final = 256  # at one time
ERRAND_TIMEOUT_S: Final = 5.0


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
        self._errands: set[asyncio.Task[None]] = set()

    def replace(self, weights: Mapping[ShardId, float], transports: dict[ShardId, ShardTransport]) -> None:
        self.weights, self.transports = dict(weights), transports

    def transport(self, shard: ShardId) -> ShardTransport:
        """Raises Unavailable for a shard that left the topology."""
        found = self.transports.get(shard)
        if found is None:
            raise Unavailable(f"shard {shard} is not in the topology any more")
        return found

    def send(self, what: str, call: Coroutine[Any, Any, object]) -> None:
        """Run an errand in the background: what the shard should hear and no caller waits for.

        Each is bounded by ERRAND_TIMEOUT_S. One that fails, or has no room, is counted by its name: a
        lease or transaction that was not given back expires by itself.
        """
        if len(self._errands) >= ERRANDS_MAX:
            call.close()
            self.counters[f"{what}:dropped"] += 1
            return
        task = asyncio.create_task(self._run(what, call))
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def finish_errands(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._errands, return_exceptions=True)

    async def _run(self, what: str, call: Coroutine[Any, Any, object]) -> None:
        try:
            async with asyncio.timeout(ERRAND_TIMEOUT_S):
                await call
        except (KVStrataError, TimeoutError) as error:
            self.counters[f"{what}:failed"] += 1
            log.warning("a shard was not told", what=what, error=str(error) or type(error).__name__)


def miss_of(error: KVStrataError) -> MissReason:
    if isinstance(error, DeadlineExceeded):
        return MissReason.DEADLINE
    return MissReason.SHARD_UNAVAILABLE if isinstance(error, Unavailable) else MissReason.REFUSED


def refusal_of(error: Exception) -> Refusal:
    if isinstance(error, DeadlineExceeded | TimeoutError):
        return Refusal.DEADLINE
    if isinstance(error, EpochUnknown | EpochConflict):
        return Refusal.EPOCH
    if isinstance(error, LeaseExpired):
        return Refusal.LEASE_EXPIRED
    return Refusal.NO_SPACE if isinstance(error, OverLimit) else Refusal.SHARD_UNAVAILABLE


@functools.cache
def this_process() -> str:
    """Whose the leases of this process are, unless its callers name somebody."""
    return f"{socket.gethostname()}:{os.getpid()}"
