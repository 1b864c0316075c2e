"""Promise 5 on a shard whose disk fails: it serves on, counts, leaves the disk alone for a while, and says no
to what it cannot make durable. And its mover never turns on the spot, whatever cannot move."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client import StoreClient
from kvstore.clock import ManualClock
from kvstore.config import StoreConfig
from kvstore.driver import ShardDriver
from kvstore.errors import Unavailable
from kvstore.hashing import digest16
from kvstore.mover import RETRY_S
from kvstore.nouns import DROP, ISOLATE, Epoch, ShardId
from kvstore.session import StoreSession
from kvstore.tiers.arena import ArenaTier
from kvstore.tiers.nvme.files import DiskFiles
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.transport.base import Purge
from tests.kvstore.test_starting import E1, KV, SECRET, SPEC, TOKENS, settings

STEPS_MAX = 50
E2, E3 = (Epoch(number, digest16(f"weights {number}")) for number in (2, 3))


class Faulty(DiskFiles):
    """Fails with `code` whatever takes room (ENOSPC) or waits for the disk (EIO)."""

    def __init__(self) -> None:
        super().__init__()
        self.code = 0
        self.failed = 0

    def _may_fail(self) -> None:
        if self.code:
            self.failed += 1
            raise OSError(self.code, "injected")

    def allocate(self, handle: int, nbytes: int) -> None:
        self._may_fail()
        super().allocate(handle, nbytes)

    def write(self, handle: int, pieces: Sequence[memoryview], offset: int) -> None:
        self._may_fail()
        super().write(handle, pieces, offset)

    def sync(self, handle: int) -> None:
        self._may_fail()
        super().sync(handle)


class Life:
    """One life of a shard in this process, on a clock of the test's."""

    def __init__(self, store: StoreConfig) -> None:
        assert store.nvme is not None
        self.files, self.clock = Faulty(), ManualClock()
        shard = ShardId("shard-0")
        nvme = NvmeTier(store.nvme.files(shard), self.files)
        config = store.driver(shard, SECRET, nvme.room_nbytes())
        self.driver = ShardDriver(config, ArenaTier(store.capacity_nbytes), self.clock, nvme)
        self.client = StoreClient.over([self.driver])

    @property
    def counters(self) -> Any:
        return self.driver.core.counters

    async def moved(self) -> None:
        """What can move has moved. It ends: nothing is tried for ever."""
        assert self.driver.mover is not None
        for _ in range(STEPS_MAX):
            if not await self.driver.mover.step():
                return
        pytest.fail("the mover turns on the spot")


@contextlib.asynccontextmanager
async def life(store: StoreConfig, *, by_hand: bool = True) -> AsyncIterator[tuple[Life, StoreSession]]:
    """`by_hand`: things move when the test says so."""
    one = Life(store)
    await one.driver.start()
    assert one.driver.mover is not None
    if by_hand:
        await one.driver.mover.stop()
    try:
        yield one, await one.client.open(SPEC, E1)
        one.driver.check_integrity()
    finally:
        await one.driver.close()


async def readable(session: StoreSession) -> int:
    hit = await session.get(TOKENS)
    assert np.array_equal(hit.kv, KV[:, :, : hit.n_tokens])
    return hit.n_tokens


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("write", ["write_through", "write_back"])
async def test_a_shard_serves_on_and_leaves_the_disk_alone(tmp_path: Path, code: int, write: str) -> None:
    async with life(settings(tmp_path, write=write, admission="always")) as (one, session):
        one.files.code = code
        for first in range(6):  # more than the host's high watermark
            await session.put([first, *TOKENS[1:96]], KV[:, :, :96])
            await one.moved()
        assert (await session.get([5, *TOKENS[1:96]])).n_tokens
        failures = one.counters[f"nvme_failed:{code}"]
        assert failures == 1, "it was tried again at once"
        tried = one.files.failed
        for _ in range(50):
            await one.driver.tick()
            await one.moved()
        assert one.files.failed == tried
        assert one.counters["upkeep_failed"] == one.counters["mover_failed"] == 0
        one.files.code = 0
        one.clock.advance(RETRY_S)
        await session.put(TOKENS, KV)
        await one.moved()
        assert await readable(session)
        assert one.counters["moved_to:nvme"] > 0


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_a_purge_that_cannot_be_noted_is_not_acknowledged(tmp_path: Path, code: int) -> None:
    store = settings(tmp_path)
    async with life(store) as (one, session):
        await session.put(TOKENS, KV)
        await one.moved()
        one.files.code = code
        for _ in range(2):
            with pytest.raises(Unavailable):
                await one.driver.purge(Purge(session.namespace), timeout_s=10)
        assert await readable(session) == 0
        one.files.code = 0
        await one.driver.purge(Purge(session.namespace), timeout_s=10)
    async with life(store) as (one, session):
        assert await readable(session) == 0


async def test_a_purge_is_done_though_frames_that_were_queued_are_lost(tmp_path: Path) -> None:
    """It needs its note, and nothing of the disk beyond."""
    async with life(settings(tmp_path)) as (one, session):
        await session.put(TOKENS, KV)
        await one.moved()
        tier = one.driver.tiers.durable
        assert isinstance(tier, NvmeTier)
        tier._losses += 1  # as a write in the background that failed leaves it
        await one.driver.purge(Purge(session.namespace), timeout_s=10)
        with pytest.raises(OSError, match="lost"):
            await tier.sync()  # whoever wrote is told


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_an_advance_that_cannot_be_noted_is_not_acknowledged(tmp_path: Path, code: int) -> None:
    store = settings(tmp_path)
    async with life(store) as (one, session):
        await session.put(TOKENS, KV)
        await one.moved()
        one.files.code = code
        with pytest.raises(Unavailable):
            await one.driver.register_epoch("model", E2, timeout_s=10)
        one.files.code = 0
        await one.driver.register_epoch("model", E2, timeout_s=10)
        one.files.code = code
        with pytest.raises(Unavailable):
            await one.driver.advance_epoch("model", 2, DROP, timeout_s=10)
        one.files.code = 0
        await one.driver.advance_epoch("model", 2, DROP, timeout_s=10)
    async with life(store) as (one, session):
        assert await readable(session) == 0
        assert one.driver.core.epochs.of("model").current == 2


@pytest.mark.parametrize("repeated", [2, 3])
async def test_a_drop_that_was_not_noted_is_noted_with_what_follows(tmp_path: Path, repeated: int) -> None:
    """The model went on meanwhile: neither may be acknowledged without the other."""
    store = settings(tmp_path)
    async with life(store) as (one, session):
        await session.put(TOKENS, KV)
        await one.moved()
        for epoch in (E2, E3):
            await one.driver.register_epoch("model", epoch, timeout_s=10)
        one.files.code = errno.EIO
        for number, policy in ((2, DROP), (3, ISOLATE)):
            with pytest.raises(Unavailable):
                await one.driver.advance_epoch("model", number, policy, timeout_s=10)
        one.files.code = 0
        await one.driver.advance_epoch("model", repeated, DROP if repeated == 2 else ISOLATE, timeout_s=10)
    async with life(store) as (one, session):
        known = one.driver.core.epochs.of("model")
        assert (known.current, known.oldest) == (3, 2)
        assert await readable(session) == 0


async def test_a_crowded_host_of_which_nothing_can_go_serves_on(tmp_path: Path) -> None:
    """Half of it is pinned, the rest being written: nothing can be moved, and the mover waits for its next
    wake."""
    async with life(settings(tmp_path, write="write_back"), by_hand=False) as (one, session):
        await session.put(TOKENS[:256], KV[:, :, :256])
        async with session.pin(TOKENS[:256]), session.transaction() as writing:
            await writing.put([7, *TOKENS[1:224]], KV[:, :, :224])
            host = one.driver.core.index.host
            assert host.used_nbytes > 0.9 * host.capacity_nbytes
            await one.driver.tick()
            assert (await session.get(TOKENS[:256])).n_tokens == 256


async def test_what_cannot_be_encoded_does_not_stand_in_the_way(tmp_path: Path) -> None:
    async with life(settings(tmp_path, write="write_back", codec="int8", admission="always")) as (
        one,
        session,
    ):
        broken = KV[:, :, :64].copy()
        broken[0, 0, ::8] = np.inf
        for first in range(20):
            await session.put([first, *TOKENS[1:64]], broken if first < 9 else KV[:, :, :64])
            await one.moved()
        assert one.counters["not_encodable"] > 0
        assert one.counters["moved_to:nvme"] > 0


async def test_what_was_dropped_and_is_not_swept_yet_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """It is next to go from a crowded host, and goes nowhere."""
    async with life(settings(tmp_path, write="write_back", admission="always")) as (one, session):
        await one.driver.register_epoch("model", E2, timeout_s=10)
        for first in range(7):
            await session.put([first, *TOKENS[1:64]], KV[:, :, :64])
        newer = await one.client.open(SPEC, E2)
        await one.driver.advance_epoch("model", 2, DROP, timeout_s=10)
        host = one.driver.core.index.host
        async with newer.transaction() as writing:
            await writing.put(TOKENS[:32], KV[:, :, :32])
            assert host.used_nbytes > 0.9 * host.capacity_nbytes
            await one.moved()
        assert (await newer.get(TOKENS[:32])).n_tokens == 32
