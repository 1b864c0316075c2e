"""Shards over real loopback gRPC, and clients of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.nouns import ShardId
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.arena import ArenaTier
from kvstore.topology import ShardEntry, Topology
from tests.kvstore.oracle import FRAME_NBYTES, SECRET

TOKEN = "a token"


@dataclass
class Served:
    """One shard behind a port; `restart` is a new process's worth of forgetting on the same port."""

    driver: ShardDriver
    server: ShardServer
    address: str

    @classmethod
    async def start(cls, name: str, frames: int = 256, port: int = 0) -> Served:
        config = DriverConfig(ShardId(name), frames * FRAME_NBYTES, SECRET, faults=True)
        driver = ShardDriver(config, ArenaTier(config.capacity_nbytes))
        server = ShardServer(driver, ServerConfig(port=port, token=TOKEN))
        return cls(driver, server, await server.start())

    async def stop(self) -> None:
        await self.server.stop(0)

    async def restart(self) -> None:
        await self.stop()
        port = int(self.address.rpartition(":")[2])
        fresh = await Served.start(self.driver.shard, port=port)
        self.driver, self.server = fresh.driver, fresh.server


@pytest.fixture
async def shards() -> AsyncIterator[list[Served]]:
    served = [await Served.start(f"shard-{i}") for i in range(3)]
    yield served
    for shard in served:
        await shard.stop()
        shard.driver.check_integrity()


@pytest.fixture
def topology(shards: list[Served]) -> Topology:
    return Topology(1, tuple(ShardEntry(s.driver.shard, s.address) for s in shards))


@pytest.fixture(params=[True, False], ids=["shm", "grpc"])
def shared_memory(request: pytest.FixtureRequest) -> bool:
    """Frames of shards on this host come out of their arenas, or over gRPC: it must not matter."""
    return bool(request.param)


@pytest.fixture
async def client(topology: Topology, shared_memory: bool) -> AsyncIterator[StoreClient]:
    async with await StoreClient.connect(topology, token=TOKEN, shared_memory=shared_memory) as connected:
        yield connected
