"""Reclaiming frees what died, keeps what lives, and takes no file from under a reader."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from kvstore.tiers.base import Place
from kvstore.tiers.nvme.threads import Result
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, verified
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline
from tests.kvstore.tiers.nvme.history import small

TURNS = 200


class Held(Inline):
    """Work that is begun while `hold` is set waits for it: a slow disk."""

    hold: asyncio.Event | None = None

    async def run(self, work: Callable[[], Result]) -> Result:
        if (hold := self.hold) is not None:
            await hold.wait()
        return await super().run(work)


async def turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def started(threads: Inline) -> tuple[NvmeTier, CrashFiles]:
    files = CrashFiles()
    tier = NvmeTier(small(), files, threads, random.Random(1).getrandbits)
    await tier.recover()
    return tier, files


async def write(tier: NvmeTier, *keys: int) -> None:
    for key in keys:
        await tier.write(Place(key, 1), Block(key).frame())
    await tier.sync()


def segments(files: CrashFiles) -> set[str]:
    return {Path(name).name for name in files.world.names if "segment-" in name}


async def test_a_file_stays_until_its_last_reader_is_done() -> None:
    threads = Held()
    tier, files = await started(threads)
    await write(tier, *range(6))
    (first,) = segments(files)
    await write(tier, *range(6, 20))
    threads.hold = asyncio.Event()
    reading = asyncio.create_task(tier.read(Place(3, 1)))
    await turns()
    hold, threads.hold = threads.hold, None
    for key in range(20):
        tier.discard(Place(key, 1))
    for key in range(100, 200):  # the disk turns over, and the event loop is not held up
        await write(tier, key)
        tier.discard(Place(key - 20, 1))
    assert first in segments(files)
    hold.set()
    frame = await reading
    assert frame is not None
    assert verified(frame) == Block(3)
    await turns()
    assert first not in segments(files)
    assert files.open_handles <= 3  # two open segments and the journal
    await tier.close()
    assert files.open_handles == 0


async def test_churn_at_random_keeps_what_lives_and_the_budget() -> None:
    tier, files = await started(Inline())
    rng = random.Random(2)
    held: list[int] = []
    for key in range(600):
        await write(tier, key)
        held.append(key)
        while tier.nbytes() > tier.room_nbytes() * 0.9:
            tier.discard(Place(held.pop(rng.randrange(len(held))), 1))
        assert files.used_nbytes <= tier.config.disk_nbytes + (1 << 16)
    for key in held:
        frame = await tier.read(Place(key, 1))
        assert frame is not None
        assert verified(frame) == Block(key)
    assert tier.counters["copied_nbytes"] > 0
    await tier.close()
