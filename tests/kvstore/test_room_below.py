"""Promise: the tier below is used as far as it can hold what it is given, and never jams."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvstore.clock import ManualClock
from kvstore.core.state import DemoteWhen, Tiering
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.mover import RETRY_S
from kvstore.nouns import Incarnation, ShardId
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.durable import E1, Tiered, wanted
from tests.kvstore.oracle import FRAME_NBYTES, SECRET, SPEC, TIMEOUT, chain, put

FOUR = [0, 1, 2, 3]


async def _started(folder: Path, life: int) -> ShardDriver:
    nvme = NvmeTier(NvmeConfig((folder,), 1 << 20, 1 << 16, direct=False, write_wait_s=0.05))
    tiering = Tiering(nvme_nbytes=nvme.room_nbytes(), when=DemoteWhen.COMMITTED)
    config = DriverConfig(
        ShardId("shard-0"), 256 * FRAME_NBYTES, SECRET, Incarnation(life), tiering=tiering
    )  # fmt: skip
    driver = ShardDriver(config, HostTier(), ManualClock(), nvme)
    await driver.recover()
    assert driver.mover is not None
    await driver.mover.stop()
    return driver


async def test_frames_that_are_padded_to_many_times_their_size_do_not_jam_the_disk(tmp_path: Path) -> None:
    driver = await _started(tmp_path, 1)
    assert driver.mover is not None
    namespace = await driver.open_namespace(SPEC, "tenant", timeout_s=TIMEOUT)
    await driver.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    moved = []
    for first in range(0, 480, 8):
        await put(driver, chain(namespace, 8, 1000 * first), list(range(8)), E1)
        while await driver.mover.step():
            pass
        await driver.tick()
        moved.append(driver.core.counters["moved_to:nvme"])
    assert driver.core.counters[f"nvme_failed:{errno.ENOSPC}"] == 0
    assert moved == list(range(8, 488, 8))
    status = await driver.status(timeout_s=TIMEOUT)
    assert status.nvme_nbytes <= status.nvme_capacity_nbytes < driver.config.tiering.nvme_nbytes / 2
    driver.check_integrity()
    await driver.close()

    again = await _started(tmp_path, 2)
    status = await again.status(timeout_s=TIMEOUT)
    assert 0 < status.nvme_nbytes <= status.nvme_capacity_nbytes < again.config.tiering.nvme_nbytes / 2
    again.check_integrity()
    await again.close()


async def test_a_tick_follows_the_room_that_the_tier_has(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = await Tiered().open()
    await shard.put(FOUR)
    for frames, left in ((3, 3), (0, 0), (100, 0)):
        monkeypatch.setattr(shard.below, "room_nbytes", lambda frames=frames: frames * FRAME_NBYTES)
        await shard.driver.tick()
        assert shard.below.nbytes() == left * FRAME_NBYTES
        shard.all_is_well()
    assert (await shard.driver.status(timeout_s=TIMEOUT)).nvme_capacity_nbytes == 16 * FRAME_NBYTES
    assert await shard.seen() == wanted(FOUR, shard.keys)


async def test_a_full_disk_gives_up_what_is_next_to_go_before_it_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It refuses all that is more than three frames, whatever it said."""
    shard = await Tiered(host_frames=32).open()
    real = shard.below.sync

    async def sync() -> None:
        if shard.below.nbytes() > 3 * FRAME_NBYTES:
            shard.disk.failures["sync"] = 1
            try:
                await real()
            except OSError as error:
                raise OSError(errno.ENOSPC, "the disk is full") from error
        await real()

    monkeypatch.setattr(shard.below, "sync", sync)
    await shard.put([0, 1, 2])
    assert shard.below.nbytes() == 3 * FRAME_NBYTES
    await shard.put([3, 4])
    assert shard.driver.core.counters[f"nvme_failed:{errno.ENOSPC}"] == 1
    assert shard.below.nbytes() == FRAME_NBYTES  # as much as the batch lacked
    shard.all_is_well()
    shard.clock.advance(RETRY_S)
    await shard.put([5, 6])
    assert shard.below.nbytes() == 3 * FRAME_NBYTES
    shard.all_is_well()
