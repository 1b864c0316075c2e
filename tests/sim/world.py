"""A small world of clients and shards that goes wrong in every way, and what must hold all the same.

    report = run_seed(17)        # the same history, every time

Three clients of one tenant or two publish, match, read, hold, delete, look back and compute over blocks of a
few chains (client.py, deeds.py), under changing weights and policies, on shards that are too small, over a
network that delays, loses and repeats, while hosts pause, crash and (in some seeds) storage gives back wrong
bytes; a watcher follows each shard (mirror.py). `Broken` is raised with the promise that did not hold:

    at once           wrong bytes (writings.py), a broken pin, KV of an epoch that nobody allowed, a purged
                      block, a snapshot that changed, another tenant's block, a quota exceeded
    at the end        a history that is not linearizable (history.py), a watcher's index that is not what the
                      shard lists, a listing that is not what a match sees, anything left behind; after one
                      more crash what was purged, what is not what it says, and what was synced and is missing

In most worlds a shard has a second, smaller tier that survives (tiers.py): blocks are demoted, encoded and
promoted all the while, over a disk that is slow and fails, and crashes are followed by a recovery.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.core.state import CoreLimits
from kvstore.core.versions import State
from kvstore.driver_config import DriverConfig
from kvstore.hashing import KeyChain
from kvstore.nouns import Incarnation, NamespaceId, ShardId
from kvstore.publication import TXN_LEASE_S
from kvstore.tiers.base import Place
from kvstore.transport.sim import Faults, SimNetwork
from kvstore.transport.sim_host import SimClock, SimHost, VirtualTimeLoop
from tests.kvstore.oracle import FRAME_NBYTES, SECRET, chain
from tests.sim.client import CHAIN_BLOCKS, Client
from tests.sim.deeds import DEEDS, trespass
from tests.sim.history import History
from tests.sim.mirror import Mirror
from tests.sim.tiers import SimDisk, SimTier, below, comes_back, moves_of
from tests.sim.witness import Witness, WitnessedDriver
from tests.sim.writings import Broken, Writings

CLIENTS = 3
CANCELS_MAX = 20
QUIET_TICK_S = 1.8  # by no clock here a pause
STEPS = (
    "open", "register", "advance", "epochs", "match", "read", "renew", "release", "begin", "write", "commit",
    "abort", "list", "watch", "purge", "compact",
)  # fmt: skip
"""The calls of the protocol: what faults are to meet."""
DOOMED = (*STEPS, "abort", "abort", "compact", "compact", "compact")
"""Calls that a host is to crash at: the rarer ones more often."""


@dataclass(slots=True)
class Report:
    """What a seed has met."""

    seed: int
    ops: Counter[str] = field(default_factory=Counter)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    blocks_matched: int = 0
    blocks_read: int = 0
    register_ops: int = 0
    moves: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.report = Report(seed)
        rough = self.rng.random() < 0.7
        faults = Faults(
            delay_s=self.rng.choice((0.0, 0.01, 0.1)),
            lose=self.rng.choice((0.01, 0.06)) if rough else 0.0,
            twice=0.1 if rough else 0.0,
        )
        self.storage_broken = 0.1 if self.rng.random() < 0.25 else 0.0
        self.crashing = self.rng.random() < 0.5
        self.network = SimNetwork(self.rng, faults)
        self.capacity = self.rng.choice((10, 40, 100)) * FRAME_NBYTES
        self.tenants = self.rng.choice((("default",), ("default",), ("red", "blue")))
        share = self.rng.choice((0.3, 0.6))
        self.quotas = {tenant: int(share * self.capacity) for tenant in self.tenants if tenant != "default"}
        self.limits = CoreLimits(changes_max=self.rng.choice((12, 1 << 16)))
        self.below = below(self.rng)
        self.carried: list[Place] = []
        self.disks: dict[ShardId, SimDisk] = {}
        self.witness, self.writings = Witness(), Writings()
        self.history = History(self.witness, holds=not self.storage_broken)
        self.epoch = 1
        self.over = False
        self.hosts: dict[ShardId, SimHost] = {}
        for index in range(self.rng.choice((1, 2, 3))):
            shard = ShardId(f"shard-{index}")
            clock = SimClock(1 + self.rng.uniform(-0.02, 0.02), self.rng.uniform(0, 1e6))
            if self.below.nvme_nbytes:
                self.disks[shard] = SimDisk(self.rng, self.network.met, rough)
            self.hosts[shard] = SimHost(shard, self._new_driver, clock)
        self.clients = [
            Client(self, f"client-{index}", self.tenants[index % len(self.tenants)])
            for index in range(CLIENTS)
        ]
        self.mirrors = [Mirror(self, host) for host in self.hosts.values()]
        self._chains: dict[tuple[NamespaceId, int], KeyChain] = {}

    def _new_driver(self, host: SimHost) -> WitnessedDriver:
        config = DriverConfig(
            host.shard,
            self.capacity,
            SECRET,
            Incarnation(self.rng.getrandbits(64)),
            self.limits,
            self.quotas,
            tiering=self.below,
            encode_frame=None if self.below.encode is None else self.writings.encode,
        )
        if host.crashes:
            self.report.moves.update(moves_of(host.driver))
        tier, disk = SimTier(host, self.rng, self.storage_broken, self.carried), self.disks.get(host.shard)
        durable = None if disk is None else disk.new_life(host, self.below, self.storage_broken)
        return WitnessedDriver(config, tier, host.clock, self.witness, durable)

    def chain(self, namespace: NamespaceId, of: int) -> KeyChain:
        made = self._chains.get((namespace, of))
        if made is None:
            made = self._chains[namespace, of] = chain(namespace, CHAIN_BLOCKS, 1000 * of)
        return made

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
                if self.rng.random() < 0.5:
                    host.crash()
                else:
                    host.doom = self.rng.choice(DOOMED)
            elif self.rng.random() < 0.5:
                self.network.met["pause", "host"] += 1
                host.pause()
                await asyncio.sleep(self.rng.uniform(0.1, 8.0))
                host.resume()


async def _live(seed: int) -> Report:
    world = World(seed)
    trouble = asyncio.create_task(world.trouble())
    watching = [asyncio.create_task(mirror.run()) for mirror in world.mirrors]
    deeds = {deed: weight for deed, weight in DEEDS.items() if deed is not trespass or world.quotas}
    try:
        await asyncio.gather(*(client.work(deeds) for client in world.clients))
        world.over = True
        await trouble
        world.network.faults = Faults(linger=0.0)
        for disk in world.disks.values():
            disk.rough = False
        for host in world.hosts.values():
            host.doom, host.tick_s = None, QUIET_TICK_S
        for client in world.clients:
            await client.end()
        await asyncio.sleep(1.3 * TXN_LEASE_S)  # longer than any lease by any clock here
        for host in world.hosts.values():
            _nothing_is_left(host)
        for mirror, watcher in zip(world.mirrors, watching, strict=True):
            if watcher.done():
                await watcher
            await mirror.check()
        world.report.register_ops = world.history.check()
        if world.carried:
            raise Broken(f"broken frames were carried up, to {world.carried}")
        for host in world.hosts.values():
            world.report.moves.update(moves_of(host.driver))
        for shard, disk in world.disks.items():
            await comes_back(world, world.hosts[shard], disk)
    finally:
        for task in (trouble, *watching):
            task.cancel()
        for host in world.hosts.values():
            await host.close()
    world.report.faults = world.network.met
    world.report.virtual_s = world.now()
    return world.report


def _nothing_is_left(host: SimHost) -> None:
    driver = host.driver
    driver.check_integrity()
    if driver.core.counters["mover_failed"]:
        raise Broken(f"batches of moves that ended by an unforeseen error on {host.shard}, see its log")
    usage = driver.core.usage()
    if driver.core.leases or usage.staged_nbytes or usage.retired_nbytes or usage.ownerless_nbytes:
        raise Broken(f"left behind on {host.shard}: {driver.core.leases} leases, {usage}")
    dead = [slot for slot in driver.core.index.slots() if driver.core.index.is_dead(slot)]
    hidden = [row for row in driver.core.index.rows() if row.state is not State.LIVE]
    if hidden or len(driver.core.moves):
        raise Broken(f"left behind on {host.shard}: {len(driver.core.moves)} moves, {hidden}")
    if dead:
        raise Broken(
            f"purged or dropped, and still on {host.shard}: {[driver.core.index.row(slot) for slot in dead]}"
        )


@contextlib.contextmanager
def _virtual_time() -> Iterator[VirtualTimeLoop]:
    loop = VirtualTimeLoop()
    try:
        yield loop
    finally:
        for _ in range(CANCELS_MAX):  # a call that is cut off may have more to say before it ends
            tasks = asyncio.all_tasks(loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        loop.close()


def run_seed(seed: int) -> Report:
    """Live through one seed's history. Raises Broken, or whatever the code under proof let out."""
    with _virtual_time() as loop:
        return loop.run_until_complete(_live(seed))
