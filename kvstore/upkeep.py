"""What a shard does by itself: end leases, discard what was freed, sweep what was deleted, wake watchers,
have storage tidy itself up.

Everything here runs on the driver's event loop in small steps. A shard that is stopped with SIGSTOP does
none of it, and ends no lease of its own pause.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog

from kvstore.clock import Clock
from kvstore.core.shard import ShardCore
from kvstore.driver_config import DriverConfig
from kvstore.notes import Notes
from kvstore.nouns import Revision
from kvstore.tiers.base import Compactable
from kvstore.tiers.durable import PurgeNote
from kvstore.tiers.hierarchy import Tiers
from kvstore.transport.base import Purge, Purged
from kvstore.watching import Watchers

log = structlog.get_logger(__name__)

SWEEP_SLOTS: Final = 16  # looked at between two turns of the event loop: at most about 0.1 ms
SWEEPS_A_TICK: Final = 2_048
RESIZE_VERSIONS: Final = 64  # given up below between two turns of the event loop: about 1 ms
RESIZES_A_TICK: Final = 64
COMPACT_NBYTES_A_TICK: Final = 64 << 20  # copied by storage to tidy itself up: some 15 ms of one core


class Upkeep:
    def __init__(
        self,
        config: DriverConfig,
        core: ShardCore,
        tiers: Tiers,
        notes: Notes,
        clock: Clock,
        watchers: Watchers,
        settled: Callable[[], None],
    ) -> None:
        """`settled` is called at the end of each `settle`."""
        self._config = config
        self._core = core
        self._tiers = tiers
        self._notes = notes
        self._compactable = tiers.host if isinstance(tiers.host, Compactable) else None
        self._clock = clock
        self._watchers = watchers
        self._settled = settled
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick_forever(), name=f"upkeep-{self._config.shard}")

    async def stop(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticking
            self._ticking = None

    def settle(self) -> None:
        """After whatever may have freed slots or let go of versions, in the same loop step: nothing of a
        freed one is left behind, watchers are told, and what is to move is noticed."""
        freed = self._core.index.freed
        for one in freed:  # in their order: a version may have left one tier, and then altogether
            self._tiers.free(one)
        freed.clear()
        self._watchers.wake()
        self._settled()

    def reap(self) -> None:
        expired = self._core.reap(self._clock.now())
        self.settle()
        if expired:
            log.info("leases expired", shard=self._config.shard, leases=expired)

    async def tick(self) -> None:
        self.reap()
        self._core.look_ahead(self._clock.now())
        self._settled()
        await self.resize()
        for _ in range(SWEEPS_A_TICK):
            if not await self._sweep():
                break
        if self._compactable is not None:
            await self._compactable.compact(COMPACT_NBYTES_A_TICK)

    async def resize(self) -> None:
        """Tell the core what room the tier below has now; a bounded part of what is too much there goes."""
        durable = self._tiers.durable
        if durable is None:
            return
        for _ in range(RESIZES_A_TICK):
            room_nbytes = min(durable.room_nbytes(), self._config.tiering.nvme_nbytes)
            went = self._core.room_below.resize(room_nbytes, RESIZE_VERSIONS)
            if not went:
                break
            self._core.counters["shrunk:nvme"] += went
            self.settle()
            await asyncio.sleep(0)

    async def purge(self, scope: Purge) -> Purged:
        """Delete, note it, and sweep. What was freed meanwhile by another purge is counted here too."""
        core = self._core
        versions, nbytes = core.purge(scope.namespace, scope.keys, scope.epoch)
        revision = Revision(self._config.incarnation, core.revision)
        before = core.counters["swept"], core.counters["swept_nbytes"]
        self.settle()
        # In the same turn of the loop: what is written below from now on was made after the purge.
        await self._notes.keep(PurgeNote(scope.namespace, scope.keys, scope.epoch))
        while await self._sweep():
            pass
        versions += core.counters["swept"] - before[0]
        return Purged(revision, versions, nbytes + core.counters["swept_nbytes"] - before[1])

    async def _sweep(self) -> int:
        """One slice; then whoever waits has a turn. How many slots are still to be looked at."""
        left = self._core.sweep(SWEEP_SLOTS)
        self.settle()
        await asyncio.sleep(0)
        return left

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.reap_interval_s)
            try:
                await self.tick()
            except Exception:  # whatever failed, leases must go on ending
                self._core.counters["upkeep_failed"] += 1
                log.exception("upkeep failed, and goes on", shard=self._config.shard)
