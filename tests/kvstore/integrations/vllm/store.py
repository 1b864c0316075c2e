"""A store in this process for tests of the connector: on the connector's own loop, and counted at the end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from kvstore.client import StoreClient
from kvstore.clock import ManualClock
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.integrations.vllm.store_side import StoreSide, loop_of_this_process
from kvstore.nouns import ShardId
from kvstore.tiers.host import HostTier

Value = TypeVar("Value")
WAIT_S = 20.0


def on_loop(work: Coroutine[Any, Any, Value]) -> Value:
    return asyncio.run_coroutine_threadsafe(work, loop_of_this_process(os.getpid())).result(WAIT_S)


class LocalStore:
    """Shards in this process. `is_down` refuses clients that connect."""

    def __init__(self, shards: int = 2) -> None:
        self.is_down = False
        configs = [DriverConfig(ShardId(f"s{i}"), 8 << 20, b"a secret of the tests") for i in range(shards)]
        self.clock = ManualClock()
        self.drivers = [ShardDriver(config, HostTier(), self.clock) for config in configs]
        for driver in self.drivers:
            on_loop(driver.start())
        self.admin = StoreClient.over(self.drivers)

    def side(self, config: ConnectorConfig, clock: ManualClock) -> StoreSide:
        async def connect() -> StoreClient:
            if self.is_down:
                raise ConnectionRefusedError("the store is down")
            return StoreClient.over([Shared(driver) for driver in self.drivers])

        return StoreSide(config, connect, clock)

    def expire(self, seconds: float) -> None:
        """So long passes, in steps that no shard takes for a pause of its own."""

        async def pass_time() -> None:
            for _ in range(int(4 * seconds)):
                self.clock.advance(0.25)
                for driver in self.drivers:
                    driver.reap()

        on_loop(pass_time())

    def leases(self) -> int:
        return sum(status.leases for status in on_loop(self.admin.status()))

    def close(self) -> None:
        on_loop(self.admin.close())


class Shared:
    """A driver as the transport of a client that may be closed without it."""

    def __init__(self, driver: ShardDriver) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    async def close(self) -> None:
        return None


@contextmanager
def local_store(shards: int = 2) -> Iterator[LocalStore]:
    """At its end nothing is pinned, staged or without an owner."""
    store = LocalStore(shards)
    try:
        yield store
        for status in on_loop(store.admin.status()):
            assert (status.leases, status.staged_nbytes, status.ownerless_nbytes) == (0, 0, 0)
    finally:
        store.close()
