"""A driver over host memory and a durable tier in memory, its mover stepped by the test; and its next
life."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.clock import ManualClock
from kvstore.core.state import DemoteWhen, Encoding, Tiering
from kvstore.core.versions import Version
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.frame import HEADER_NBYTES, decode_frame, encode_header
from kvstore.hashing import KeyChain
from kvstore.mover import EncodeFrame, Mover
from kvstore.nouns import (
    BlockKey,
    Epoch,
    Incarnation,
    KVLayout,
    MissReason,
    NamespaceId,
    Quality,
    ShardId,
    Snapshot,
    Tier,
)
from kvstore.tiers.base import Place, place_of
from kvstore.tiers.host import HostTier
from tests.kvstore.oracle import FRAME_NBYTES, SECRET, SPEC, TIMEOUT, chain, epoch, get, payload, put, refs_in
from tests.kvstore.tiers.durable_memory import Disk, DurableMemory

E1, E2 = epoch(1), epoch(2)
ENCODED_NBYTES = HEADER_NBYTES + 32


def encoding(_layout: KVLayout) -> Encoding:
    return Encoding(Quality.INT8, ENCODED_NBYTES)


def encode(frame: memoryview, _layout: KVLayout) -> memoryview:
    """A toy codec: what is left is a keyed function of what the block is."""
    found, _ = decode_frame(frame)
    meta = found.meta
    body = payload(meta.key, meta.epoch, Quality.INT8)[:32]
    lesser = type(meta)(
        meta.namespace, meta.key, meta.parent, meta.chain_index, meta.placement, meta.epoch, Quality.INT8,
        meta.fingerprint,
    )  # fmt: skip
    return memoryview(bytearray(encode_header(lesser, body, codec=9) + body))


class Tiered:
    """One shard; `restart` is its next life, over the same disk."""

    def __init__(
        self,
        host_frames: int = 8,
        below_frames: int = 16,
        encode: EncodeFrame | None = None,
        secret: bytes = SECRET,
        **tiering: object,
    ) -> None:
        self.disk = Disk()
        self.clock = ManualClock()
        options = {"when": DemoteWhen.COMMITTED, "encode": encoding if encode else None} | tiering
        self._tiering = Tiering(nvme_nbytes=below_frames * FRAME_NBYTES, **options)  # type: ignore[arg-type]
        self._parts = host_frames * FRAME_NBYTES, secret
        self._encode = encode
        self._lives = 0
        self.begin()

    def begin(self) -> None:
        self._lives += 1
        config = DriverConfig(
            ShardId("shard-0"), *self._parts, Incarnation(self._lives),
            tiering=self._tiering, encode_frame=self._encode,
        )  # fmt: skip
        self.host, self.below = HostTier(), DurableMemory(self.disk, reclaimed=0.0)
        self.driver = ShardDriver(config, self.host, self.clock, self.below)

    async def open(self) -> Tiered:
        await self.driver.recover()
        self.namespace: NamespaceId = await self.driver.open_namespace(SPEC, "tenant", timeout_s=TIMEOUT)
        for known in (E1, E2):
            await self.driver.register_epoch(SPEC.model_id, known, timeout_s=TIMEOUT)
        self.keys: KeyChain = chain(self.namespace, 8)
        await self.mover.stop()
        return self

    @property
    def mover(self) -> Mover:
        assert self.driver.mover is not None
        return self.driver.mover

    async def restart(self, *, opened: bool = True) -> None:
        """Power is lost. Without `opened` nobody has spoken to the shard since."""
        await self.driver.close()
        self.disk.crash()
        self.begin()
        if opened:
            await self.open()
        else:
            await self.driver.recover()
            await self.mover.stop()

    async def put(self, which: Sequence[int], of: Epoch = E1) -> None:
        """Committed, let go of, and moved as far as it wants to."""
        await put(self.driver, self.keys, which, of, request_id=repr((self._lives, which, of)).encode() * 2)
        await self.move()

    async def move(self) -> None:
        while await self.mover.step():
            pass

    async def leave_host(self) -> None:
        """Whatever is idle loses its place on the host."""
        core = self.driver.core
        while (victim := core.index.host.evictables.victim(None, core.index.now)) is not None:
            core.retiring.evict_from(core.index.host, victim)
        self.driver._settle()

    async def seen(self, of: Epoch = E1, least: Quality = Quality.LOSSLESS) -> list[bytes | MissReason]:
        """Payloads of the longest run of the chain that is seen, as read; nothing is held afterwards."""
        snapshot = Snapshot(self.namespace, of, least)
        matched = await self.driver.match(snapshot, self.keys.keys, "r", 10.0, timeout_s=TIMEOUT)
        got = await get(self.driver, self.namespace, refs_in(matched))
        if matched.lease is not None:
            await self.driver.release([matched.lease], timeout_s=TIMEOUT)
        return got

    def row(self, i: int, quality: Quality = Quality.LOSSLESS) -> Version:
        key: BlockKey = self.keys.keys[i]
        return next(r for r in self.driver.core.index.rows() if r.key == key and r.quality is quality)

    def place(self, i: int, quality: Quality = Quality.LOSSLESS) -> Place:
        return place_of(self.row(i, quality).ref)

    def on(self) -> dict[int, Tier]:
        """Of each version of epoch 1 and full quality, by its number in the chain."""
        rows = [r for r in self.driver.core.index.rows() if r.quality is Quality.LOSSLESS]
        return {self.keys.keys.index(r.key): r.tier for r in rows if r.epoch == E1}

    def all_is_well(self) -> None:
        """Nothing is held or under way, and each tier holds what it should."""
        self.driver.check_integrity()
        core = self.driver.core
        assert core.leases == len(core.moves) == 0
        assert core.usage().ownerless_nbytes == 0


def wanted(which: Sequence[int], keys: KeyChain, of: Epoch = E1) -> list[bytes | MissReason]:
    return [payload(keys.keys[i], of) for i in which]
