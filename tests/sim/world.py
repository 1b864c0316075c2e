"""A small world of clients and shards that goes wrong in every way, and what must hold all the same.

    report = run_seed(17)        # the same history, every time

Three clients publish, match, read, hold and let go blocks of a few chains, under changing weights, on shards
that are too small, over a network that delays, loses and repeats, while hosts pause, crash and (in some
seeds) storage gives back wrong bytes. Held against each answer is the oracle (tests/kvstore/oracle.py): bytes
that tell where they come from. `Broken` is raised with the promise that did not hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.driver import DriverConfig, ShardDriver
from kvstore.nouns import (
    Incarnation,
    ShardId,
)
from kvstore.publication import TXN_LEASE_S
from kvstore.tiers.base import Place
from kvstore.tiers.host import HostTier
from kvstore.transport.sim import Faults, SimClock, SimHost, SimNetwork, VirtualTimeLoop
from tests.kvstore.oracle import FRAME_NBYTES, SECRET
from tests.sim.client import Broken, Client

CLIENTS = 3


class SimTier(HostTier):
    """Host memory that takes its time, stands still with its host, and may give back what it should not."""

    def __init__(self, host: SimHost, rng: random.Random, broken: float) -> None:
        super().__init__()
        self._host = host
        self._rng = rng
        self._broken = broken
        self._some: memoryview | None = None

    async def write(self, place: Place, frame: memoryview) -> None:
        await self._wait()
        await super().write(place, frame)
        self._some = memoryview(bytearray(frame))

    async def read(self, place: Place) -> memoryview | None:
        await self._wait()
        copy = await super().read(place)
        await self._wait()
        if copy is not None and self._rng.random() < self._broken:
            if self._some is not None and self._rng.random() < 0.5:
                return memoryview(bytearray(self._some))  # a read that went to another place
            copy[self._rng.randrange(copy.nbytes)] ^= 1 << self._rng.randrange(8)
        return copy

    async def _wait(self) -> None:
        await asyncio.sleep(self._rng.random() * 0.005)
        await self._host.awake()


@dataclass(slots=True)
class Report:
    """What a seed has met."""

    seed: int
    ops: Counter[str] = field(default_factory=Counter)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    blocks_read: int = 0
    virtual_s: float = 0.0


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.report = Report(seed)
        rough = self.rng.random() < 0.7
        faults = Faults(
            delay_s=self.rng.choice((0.0, 0.01, 0.1)),
            lose=self.rng.choice((0.01, 0.08)) if rough else 0.0,
            twice=0.1 if rough else 0.0,
        )
        self.storage_broken = 0.1 if self.rng.random() < 0.25 else 0.0
        self.crashing = self.rng.random() < 0.5
        self.network = SimNetwork(self.rng, faults)
        self.capacity = self.rng.choice((8, 30, 100)) * FRAME_NBYTES
        self.hosts: dict[ShardId, SimHost] = {}
        for index in range(self.rng.choice((1, 2, 3))):
            shard = ShardId(f"shard-{index}")
            clock = SimClock(1 + self.rng.uniform(-0.02, 0.02), self.rng.uniform(0, 1e6))
            self.hosts[shard] = SimHost(shard, self._new_driver, clock)
        self.epoch = 1
        self.over = False

    def _new_driver(self, host: SimHost) -> ShardDriver:
        config = DriverConfig(host.shard, self.capacity, SECRET, Incarnation(self.rng.getrandbits(64)))
        return ShardDriver(config, SimTier(host, self.rng, self.storage_broken), host.clock)

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def crashes(self) -> dict[ShardId, int]:
        return {shard: host.crashes for shard, host in self.hosts.items()}

    async def trouble(self) -> None:
        """Pauses and crashes, until the clients are done."""
        while not self.over:
            await asyncio.sleep(self.rng.uniform(0.2, 3.0))
            host = self.rng.choice(list(self.hosts.values()))
            if self.crashing and self.rng.random() < 0.5:
                self.network.met["crash", "host"] += 1
                host.crash()
            elif self.rng.random() < 0.5:
                self.network.met["pause", "host"] += 1
                host.pause()
                await asyncio.sleep(self.rng.uniform(0.1, 8.0))
                host.resume()


async def _live(seed: int) -> Report:
    world = World(seed)
    clients = [Client(world, f"client-{index}") for index in range(CLIENTS)]
    trouble = asyncio.create_task(world.trouble())
    try:
        await asyncio.gather(*(client.work() for client in clients))
        world.over = True
        await trouble
        world.network.faults = Faults(linger=0.0)
        for client in clients:
            await client.end()
        await asyncio.sleep(1.3 * TXN_LEASE_S)  # longer than any lease by any clock here
        for host in world.hosts.values():
            _nothing_is_left(host)
    finally:
        trouble.cancel()
        for host in world.hosts.values():
            await host.close()
    world.report.faults = world.network.met
    world.report.virtual_s = world.now()
    return world.report


def _nothing_is_left(host: SimHost) -> None:
    driver = host.driver
    driver.check_integrity()
    usage = driver.core.usage()
    if driver.core.leases or usage.staged_nbytes or usage.retired_nbytes or usage.ownerless_nbytes:
        raise Broken(f"left behind on {host.shard}: {driver.core.leases} leases, {usage}")


@contextlib.contextmanager
def _virtual_time() -> Iterator[VirtualTimeLoop]:
    loop = VirtualTimeLoop()
    try:
        yield loop
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def run_seed(seed: int) -> Report:
    """Live through one seed's history. Raises Broken, or whatever the code under proof let out."""
    with _virtual_time() as loop:
        return loop.run_until_complete(_live(seed))
