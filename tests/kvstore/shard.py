"""A driver to itself, on a clock of the test's, with one namespace and two epochs open."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.clock import ManualClock
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.nouns import BlockKey, Incarnation, LeaseId, Snapshot
from kvstore.tiers.host import HostTier
from kvstore.transport.base import MatchResult
from tests.kvstore.oracle import FRAME_NBYTES, SECRET, SPEC, TIMEOUT, epoch, new_driver

E1, E2 = epoch(1), epoch(2)


class Shard:
    """A driver with one namespace and two epochs, on a clock of the test's."""

    def __init__(self, frames: int = 64, **changes: object) -> None:
        self.clock = ManualClock()
        config = DriverConfig(
            shard=new_driver().shard,
            capacity_nbytes=frames * FRAME_NBYTES,
            cluster_secret=SECRET,
            incarnation=Incarnation(7),
            **changes,  # type: ignore[arg-type]
        )
        self.driver = ShardDriver(config, HostTier(), self.clock)

    async def open(self) -> Shard:
        self.namespace = await self.driver.open_namespace(SPEC, "tenant", timeout_s=TIMEOUT)
        for known in (E1, E2):
            await self.driver.register_epoch(SPEC.model_id, known, timeout_s=TIMEOUT)
        return self

    def snapshot(self, **changes: object) -> Snapshot:
        return Snapshot(**{"namespace": self.namespace, "epoch": E1} | changes)  # type: ignore[arg-type]

    async def match(
        self, keys: Sequence[BlockKey], snapshot: Snapshot | None = None, lease_s: float = 10.0
    ) -> MatchResult:
        return await self.driver.match(
            snapshot or self.snapshot(), keys, "reader", lease_s, timeout_s=TIMEOUT
        )

    def later(self, seconds: float) -> None:
        """Time passes as it does for a shard that runs: in small steps, with the reaper at each."""
        for _ in range(int(seconds)):
            self.clock.advance(1.0)
            self.driver.core.reap(self.clock.now())
        self.driver._upkeep.settle()
        self.driver.check_integrity()


def leases(matched: MatchResult) -> list[LeaseId]:
    assert matched.lease is not None
    return [matched.lease]
