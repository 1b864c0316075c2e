"""A shard whose blocks lie below the host: a durable tier in memory, that can be made to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.core.state import DemoteWhen, Tiering
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.hashing import KeyChain
from kvstore.nouns import BlockKey, Incarnation, NamespaceId, ShardId, Snapshot, Tier
from kvstore.tiers.base import Place
from kvstore.tiers.durable import Note, Recovered
from kvstore.tiers.host import HostTier
from tests.kvstore.oracle import FRAME_NBYTES, SECRET, SPEC, TIMEOUT, chain, epoch, put

E1 = epoch(1)


class MemoryTier(HostTier):
    """Keeps frames as the host does and survives nothing. `gate` holds up whoever reads."""

    tier = Tier.NVME

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def borrow(self, place: Place) -> memoryview | None:
        await self.gate.wait()
        return await super().borrow(place)

    async def recover(self) -> Recovered:
        return Recovered((), (), {})

    def adopt(self, record: int, place: Place) -> None:
        raise AssertionError("nothing survives here")

    async def note(self, note: Note) -> None:
        """It would be forgotten anyway."""

    def room_nbytes(self) -> int:
        return 1 << 40

    async def close(self) -> None:
        """Nothing runs in the background."""


def tiered(name: str = "shard-0", frames: int = 16, **changes: object) -> tuple[ShardDriver, MemoryTier]:
    below = MemoryTier()
    config = DriverConfig(
        shard=ShardId(name),
        capacity_nbytes=frames * FRAME_NBYTES,
        cluster_secret=SECRET,
        incarnation=Incarnation(7),
        **{"tiering": Tiering(nvme_nbytes=1 << 20, when=DemoteWhen.COMMITTED)} | changes,  # type: ignore[arg-type]
    )
    return ShardDriver(config, HostTier(), durable=below), below


async def opened(driver: ShardDriver) -> NamespaceId:
    namespace = await driver.open_namespace(SPEC, "default", timeout_s=TIMEOUT)
    await driver.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    return namespace


async def put_below(driver: ShardDriver, namespace: NamespaceId, blocks: int, first: int = 0) -> KeyChain:
    """A chain that lies below the host alone."""
    made = chain(namespace, blocks, first)
    await put(driver, made, range(blocks), E1)
    await sink(driver, made.keys)
    return made


async def sink(driver: ShardDriver, keys: Sequence[bytes] | None = None) -> None:
    """Move everything down, then have the host give all of it up. `keys`: what must lie below then."""
    assert driver.mover is not None
    core = driver.core
    while core.moves.any_wanted() or len(core.moves):
        await driver.mover.step()
        await asyncio.sleep(0)  # its own task may be at it
    while (victim := core.index.host.evictables.victim(None, core.index.now)) is not None:
        core.retiring.evict_from(core.index.host, victim)
    driver._settle()
    tiers = {version.key: version.tier for version in core.index.rows()}
    assert {tiers[BlockKey(key)] for key in keys or tiers} == {Tier.NVME}


def snapshot(namespace: NamespaceId) -> Snapshot:
    return Snapshot(namespace, E1)
