"""The storage of simulated shards: host memory, and in most worlds a small tier below it that survives.

Both take their time and stand still with their host. In some worlds reads give back what they should not.
The disk below fails reads, syncs and notes, and loses what was not synced when its host crashes.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from kvstore.core.state import DemoteWhen, Encoding, Tiering
from kvstore.core.versions import ON_NVME, State, Version
from kvstore.driver import ShardDriver
from kvstore.errors import CorruptBlock
from kvstore.frame import decode_frame
from kvstore.nouns import BlockKey, KVLayout, NamespaceId, Quality, Tier
from kvstore.tiers.base import Place, place_of
from kvstore.tiers.host import HostTier
from kvstore.transport.sim_host import SimHost
from tests.kvstore.oracle import FRAME_NBYTES
from tests.kvstore.tiers.durable_memory import Disk, DurableMemory, frame_of
from tests.sim.witness import covers
from tests.sim.writings import Broken

if TYPE_CHECKING:
    from tests.sim.world import World

FAILS: Final = {"read": 0.02, "write": 0.01, "sync": 0.06, "note": 0.04}
DISK_STEPS: Final = (*FAILS, "recover")
DISK_FAULTS: Final = ("failed", "crash in", "pause in")
RECLAIMED: Final = 0.5
STEP_S: Final = 0.05
RECOVERY_S: Final = 0.5
"""The longest step of a disk: long enough that a pause or a crash meets each kind within the seeds."""
Wait = Callable[[str], Awaitable[None]]


def below(rng: random.Random) -> Tiering:
    """What lies below the hosts of a world."""
    if rng.random() < 0.25:
        return Tiering()
    return Tiering(
        nvme_nbytes=rng.choice((8, 30, 100)) * FRAME_NBYTES,
        when=rng.choice(tuple(DemoteWhen)),
        exclusive=rng.random() < 0.3,
        encode=_encoding if rng.random() < 0.4 else None,
        watermarks=rng.choice(((0.9, 0.8), (0.5, 0.2))),
        queue_nbytes_max=rng.choice((6, 1000)) * FRAME_NBYTES,
    )


def _encoding(_layout: KVLayout) -> Encoding:
    return Encoding(Quality.INT8, FRAME_NBYTES)


class SimTier(HostTier):
    """Host memory that takes its time, stands still with its host, and may give back what it should not."""

    def __init__(self, host: SimHost, rng: random.Random, broken: float, carried: list[Place]) -> None:
        """`carried`: where broken frames were written to, by a mover that did not look."""
        super().__init__()
        self._carried = carried
        self._host = host
        self._rng = rng
        self._broken = broken
        self._some: memoryview | None = None

    async def write(self, place: Place, frame: memoryview) -> None:
        await self._wait()
        if not is_frame(frame):
            self._carried.append(place)
        await super().write(place, frame)
        self._some = memoryview(bytearray(frame))

    async def read(self, place: Place) -> memoryview | None:
        copy = await super().read(place)  # which waits
        await self._wait()
        if copy is not None and self._rng.random() < self._broken:
            if self._some is not None and self._rng.random() < 0.5:
                return memoryview(bytearray(self._some))  # a read that went to another place
            copy[self._rng.randrange(copy.nbytes)] ^= 1 << self._rng.randrange(8)
        return copy

    async def _wait(self) -> None:
        await asyncio.sleep(self._rng.random() * 0.005)
        await self._host.awake()

    async def borrow(self, place: Place) -> memoryview | None:
        await self._wait()
        return await super().borrow(place)


class SimDisk(Disk):
    """What outlives the lives of a host."""

    def __init__(self, rng: random.Random, met: Counter[tuple[str, str]], rough: bool) -> None:
        super().__init__(rng.getrandbits(32))
        self.rng = rng
        self.rough = rough
        self.counted = met
        self.under_way: Counter[str] = Counter()

    def new_life(self, host: SimHost, tiering: Tiering, broken: float) -> DurableMemory:
        for what, times in self.under_way.items():
            self.counted["crash in", what] += times
        self.under_way.clear()
        self.crash()

        async def wait(what: str) -> None:
            self.counted["done", what] += 1
            self.under_way[what] += 1
            life = self.life
            try:
                await asyncio.sleep(self.rng.random() * (RECOVERY_S if what == "recover" else STEP_S))
                if not host.is_awake:
                    self.counted["pause in", what] += 1
                await host.awake()
            finally:
                if life == self.life:
                    self.under_way[what] -= 1
            if self.rough and self.rng.random() < FAILS.get(what, 0.0):
                self.counted["failed", what] += 1
                raise OSError(errno.EIO, f"{what} failed")

        return SimDurable(self, tiering.nvme_nbytes, wait, broken)


class SimDurable(DurableMemory):
    def __init__(self, disk: SimDisk, room_nbytes: int, wait: Wait, broken: float) -> None:
        super().__init__(disk, room_nbytes, wait, RECLAIMED)
        self._rng = disk.rng
        self._broken = broken

    async def read(self, place: Place) -> memoryview | None:
        copy = await super().read(place)
        if copy is not None and self._rng.random() < self._broken:
            others = sorted(self._places)
            if self._rng.random() < 0.5:  # a read that went to another place
                return (
                    memoryview(bytearray(frame_of(self._places[self._rng.choice(others)][1])))
                    if others
                    else None
                )
            copy[self._rng.randrange(copy.nbytes)] ^= 1 << self._rng.randrange(8)
        return copy


def is_frame(frame: memoryview) -> bool:
    try:
        decode_frame(frame)
    except CorruptBlock:
        return False
    return True


async def comes_back(world: World, host: SimHost, disk: SimDisk) -> None:
    """One more crash: what was synced is there, is what it says, and was not purged."""
    known = host.driver.core.index
    before = {
        _name(row)
        for row in known.rows()
        if row.state is State.LIVE and known.versions.residences[row.ref.slot] & ON_NVME
    }
    host.crash()
    await host.ready()
    driver = host.driver
    driver.check_integrity()
    rows = list(driver.core.index.rows())
    missing = before - {_name(row) for row in rows}
    frames = sum(isinstance(one.what, bytearray) for one in disk.stored)  # what was given up lies about, too
    if missing and frames * FRAME_NBYTES <= world.below.nvme_nbytes:
        raise Broken(f"synced, and not there after a crash of {host.shard}: {missing}")
    for row in rows:
        if row.tier is not Tier.NVME:
            raise Broken(f"{row} lies where nothing survives")
        frame = await driver.tiers.durable.read(place_of(row.ref))  # type: ignore[union-attr]
        if frame is None or world.storage_broken:
            continue
        found, payload = decode_frame(frame)
        writing = world.writings.origin(payload, row.namespace, row.key, found.meta.epoch, found.meta.quality)
        for purge in world.history.purges:
            scope = purge.scope
            begun = world.witness.begun.get((host.shard, writing.number), 0)
            hit = purge.shard == host.shard and begun < purge.served
            if hit and covers(scope, row.namespace, row.key, row.epoch.number):
                raise Broken(f"purged by {purge}, and back after a crash: {writing}")


def _name(row: Version) -> tuple[NamespaceId, BlockKey, int, Quality]:
    return row.namespace, row.key, row.epoch.number, row.quality


def moves_of(driver: ShardDriver) -> Counter[str]:
    """What came of the moves of a shard's last life."""
    kinds = ("moved_to", "move_failed", "promotions_", "demotions_", "nvme_failed", "host_failed", "moves_",
             "source_failed", "recovery:", "not_encodable", "mover_failed")  # fmt: skip
    return Counter({k: n for k, n in driver.core.counters.items() if k.startswith(kinds)})
