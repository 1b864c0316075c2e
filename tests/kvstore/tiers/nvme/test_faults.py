"""Disks that fail: an error is seen, costs what was not kept yet and no more, and gives no wrong byte."""

from __future__ import annotations

import asyncio
import errno
import random
from contextlib import suppress

import pytest

from kvstore import failpoints
from kvstore.errors import ConfigError, CorruptBlock
from kvstore.tiers.base import Place
from kvstore.tiers.durable import PurgeNote
from kvstore.tiers.nvme import journal
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, namespace_of, verified
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline, Operation, World
from tests.kvstore.tiers.nvme.history import History, Oracle, Written, adopt_all, blocks_of, small
from tests.kvstore.tiers.nvme.test_reclaiming import Held


@pytest.fixture(autouse=True)
def _journals_are_rewritten_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "GROWTH_NBYTES", 1_000)


class FailAt:
    """The n-th operation (or read) fails, or all from there on; which one is what the run asks."""

    def __init__(self, at: int, code: int, *, times: int = 1) -> None:
        self.at, self.code, self.times = at, code, times
        self.seen = 0
        self.failed: list[Operation] = []

    def __call__(self, operation: Operation) -> OSError | None:
        if self.code == errno.ENOSPC and operation.kind == "read":
            return None
        self.seen += 1
        if not self.at < self.seen <= self.at + self.times:
            return None
        self.failed.append(operation)
        return OSError(self.code, "injected")


class Careful(History):
    """A history whose calls may fail: what failed is forgotten by the tier, and may survive or not."""

    async def sync(self) -> None:
        try:
            await super().sync()
        except OSError:
            for slot in [s for s, w in self.held.items() if w.kept > self.now]:
                assert await self.tier.read(Place(slot, 1)) is None, "a sync that raised kept a frame"
                self.forget(slot)
            self.unkept.clear()

    async def write(self) -> None:
        slot = self.slots
        try:
            await super().write()
        except OSError:
            self.forget(slot)

    async def purge(self) -> None:
        try:
            await super().purge()
        except OSError:
            for slot in [s for s, w in self.held.items() if w.purging <= self.now]:
                self.forget(slot)

    async def note(self) -> None:
        try:
            await super().note()
        except OSError:
            return

    async def reread(self) -> None:
        if self.held:
            slot, written = self.rng.choice(list(self.held.items()))
            frame = await self.tier.read(Place(slot, 1))
            if frame is None:
                self.forget(slot)  # EIO, or a failed write since: a miss
            else:
                assert verified(frame) == written.block


async def faulty(seed: int, fault: FailAt, steps: int) -> Careful:
    files = CrashFiles()
    history = Careful(files, small(), random.Random(seed), Oracle())
    await history.open()
    files.fails = fault
    await history.run(steps)
    files.fails = lambda _: None
    return history


STEPS = 90


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_any_operation_may_fail(code: int) -> None:
    """Afterwards the tier works on: all it holds can be read, more can be kept, a restart finds it."""
    counting = FailAt(1 << 30, code)
    await (await faulty(5, counting, STEPS)).tier.close()
    for at in range(code % 2, counting.seen, 2):  # each operation fails in one of the two ways
        history = await faulty(5, fault := FailAt(at, code), STEPS)
        assert fault.failed
        await history.sync()  # tells what was lost before it
        block = Block(1000)
        await history.tier.write(Place(history.slots, 1), block.frame())
        await history.tier.sync()
        for slot, written in history.held.items():
            frame = await history.tier.read(Place(slot, 1))
            if frame is None:
                assert fault.failed[0].kind == "read"
                written.discarding = 0
            else:
                assert verified(frame) == written.block
        await power_lost(history, block, at)
        await history.tier.close()
        again = NvmeTier(small(), CrashFiles(history.files.world.as_it_is()), Inline())
        found = await again.recover()
        there = blocks_of(found)
        assert block in there
        assert {written.block for written in history.held.values() if written.discarding} <= set(there)
        await adopt_all(again, found)
        await again.close()


async def power_lost(history: Careful, block: Block, seed: int) -> None:
    """What was kept by a sync that succeeded, before and after the fault, is on the disk itself."""
    history.oracle.writes.append(Written(block, 0, kept=0))
    world = history.files.world.survivor(random.Random(seed))
    tier = NvmeTier(small(), CrashFiles(world), Inline())
    found = await tier.recover()
    history.oracle.check(found, history.now)
    await adopt_all(tier, found)
    await tier.close()


async def test_a_failed_sync_is_never_tried_again() -> None:
    files = CrashFiles()
    tier = NvmeTier(small(), files, Inline())
    await tier.recover()
    await tier.write(Place(1, 1), Block(1).frame())
    await tier.sync()
    await tier.write(Place(2, 1), Block(2).frame())
    files.fails = lambda o: OSError(errno.EIO, "lost") if o.kind == "sync" else None
    with pytest.raises(OSError, match="lost"):
        await tier.sync()
    files.fails = lambda _: None
    at = len(files.log)
    failed = [o.file for o in files.log if o.kind == "write"][-1]
    await tier.sync()
    assert await tier.read(Place(2, 1)) is None
    assert await tier.read(Place(1, 1)) is not None
    await tier.write(Place(3, 1), Block(3).frame())
    await tier.sync()
    assert all(o.file != failed for o in files.log[at:]), "the failed segment was touched again"
    assert tier.counters["segments_failed"] == 1
    assert tier.counters["frames_lost"] == 1
    await tier.close()


async def test_a_failure_between_syncs_is_told_by_the_next_one() -> None:
    files = CrashFiles()
    tier = NvmeTier(small(), files, Inline())
    await tier.recover()
    files.fails = lambda o: OSError(errno.EIO, "lost") if o.kind == "write" else None
    for key in range(8):  # more than a batch: written in the background
        await tier.write(Place(key, 1), Block(key).frame())
    while not tier.counters["segments_failed"] and not tier.counters["frames_lost"]:
        await Inline().run(lambda: None)
    files.fails = lambda _: None
    with pytest.raises(OSError, match="lost"):
        await tier.sync()
    await tier.sync()
    assert tier.nbytes() == 0
    await tier.close()


async def fill(tier: NvmeTier, kept: list[int]) -> None:
    for key in range(1_000):
        await tier.write(Place(key, 1), Block(key).frame())
        await tier.sync()
        kept.append(key)


async def test_a_full_disk_serves_reads_and_takes_writes_again() -> None:
    files = CrashFiles(capacity_nbytes=3 << 16)
    tier = NvmeTier(small(), files, Inline())
    await tier.recover()
    kept: list[int] = []
    with pytest.raises(OSError, match="no space") as raised:
        await fill(tier, kept)
    assert raised.value.errno == errno.ENOSPC
    assert len(kept) > 10
    frames = [await tier.read(Place(key, 1)) for key in kept]
    assert [verified(frame).key for frame in frames if frame is not None] == kept
    files.capacity_nbytes = None
    await tier.write(Place(200, 1), Block(200).frame())
    await tier.sync()
    assert await tier.read(Place(200, 1)) is not None
    await tier.close()


async def test_a_budget_that_is_full_of_live_frames_refuses_writes_and_recovers() -> None:
    tier = NvmeTier(small(write_wait_s=0.01), CrashFiles(), Inline())
    await tier.recover()
    kept: list[int] = []
    with pytest.raises(OSError, match="is full"):
        await fill(tier, kept)
    for key in kept[: len(kept) // 2]:
        tier.discard(Place(key, 1))
    await tier.write(Place(2_000, 1), Block(2_000).frame())
    await tier.sync()
    for key in (*kept[len(kept) // 2 :], 2_000):
        assert await tier.read(Place(key, 1)) is not None
    await tier.close()


async def made(seed: int) -> tuple[World, set[Block]]:
    """Disks with sealed segments, an open one, a journal with a purge; and all blocks ever written."""
    history = History(CrashFiles(), small(), random.Random(seed), Oracle())
    await history.open()
    await history.run(60)
    await history.tier.note(PurgeNote(namespace_of(7), None, None))
    await history.sync()
    world = history.files.world.as_it_is()
    await history.tier.close()
    return world, {written.block for written in history.oracle.writes}


async def served(world: World) -> set[Block] | None:
    """What these disks give, every byte compared; None where they are refused."""
    tier = NvmeTier(small(), CrashFiles(world), Inline())
    try:
        found = await tier.recover()
    except ConfigError:
        return None
    blocks: set[Block] = set()
    for slot, block in enumerate(blocks_of(found)):
        tier.adopt(slot, Place(slot, 1))
        frame = await tier.read(Place(slot, 1))
        if frame is None:
            assert tier.counters["corrupt"]
            continue
        with suppress(CorruptBlock):  # every reader verifies: a miss
            assert verified(frame) == block
            blocks.add(block)
    await tier.close()
    return blocks


async def test_bits_may_flip_anywhere() -> None:
    world, written = await made(11)
    whole = await served(world.as_it_is())
    assert whole is not None
    rng = random.Random(12)
    lost = refused = 0
    places = [(file, at) for file in set(world.names.values()) for at in places_of(world, file, rng)]
    for file, at in places:
        broken = world.as_it_is()
        broken.inodes[file].live[at] ^= 1 << rng.randrange(8)
        blocks = await served(broken)
        refused += blocks is None
        if blocks is not None:
            assert blocks <= written
            lost += len(whole - blocks)
    assert lost
    assert refused


def places_of(world: World, file: int, rng: random.Random) -> list[int]:
    """All of what a file's structure is made of, some of its payload."""
    content = bytes(world.inodes[file].live)
    used = [at for at in range(len(content)) if content[at]]
    heads = range(min(len(content), 64))
    return sorted({*rng.sample(used, min(60, len(used))), *heads})


async def test_files_may_be_cut_anywhere() -> None:
    world, written = await made(13)
    rng = random.Random(14)
    for file in sorted(set(world.names.values())):
        nbytes = len(world.inodes[file].live)
        for cut in sorted(
            {0, 1, 100, nbytes - 1, *(rng.randrange(nbytes + 1) for _ in range(40))} if nbytes else {0}
        ):
            broken = world.as_it_is()
            del broken.inodes[file].live[max(0, cut) :]
            blocks = await served(broken)
            assert blocks is None or blocks <= written


async def test_each_sync_tells_of_what_was_lost_of_its_own() -> None:
    """A frame that was written while a sync ran, and lost by its failure, is told by its own."""
    files, threads = CrashFiles(), Held()
    tier = NvmeTier(small(), files, threads)
    await tier.recover()
    await tier.write(Place(1, 1), Block(1).frame())
    await tier.sync()
    await tier.write(Place(2, 1), Block(2).frame())
    hold = threads.hold = asyncio.Event()
    first = asyncio.create_task(tier.sync())
    await asyncio.sleep(0)
    await tier.write(Place(3, 1), Block(3).frame())
    files.fails = lambda o: OSError(errno.EIO, "lost") if o.kind == "sync" else None
    hold.set()
    threads.hold = None
    with pytest.raises(OSError, match="lost"):
        await first
    files.fails = lambda _: None
    assert await tier.read(Place(3, 1)) is None
    with pytest.raises(OSError, match="lost"):
        await tier.sync()
    await tier.sync()
    await tier.close()


async def test_a_sync_confirms_no_write_that_was_not_queued_when_it_began() -> None:
    """Its own sync fails: it is forgotten by that, and not believed on the word of an earlier one."""
    files = CrashFiles()
    tier = NvmeTier(small(), files, Inline())
    await tier.recover()
    await tier.write(Place(0, 1), Block(0).frame())
    await tier.sync()  # its segment is there: the next sync is of frames
    await tier.write(Place(1, 1), Block(1).frame())
    standing = asyncio.Event()
    failpoints.arm("storage.write", failpoints.Delay(standing))
    try:
        writing = asyncio.create_task(tier.write(Place(2, 1), Block(2).frame()))
        await asyncio.sleep(0)  # it has its number, and stands before the queue
        # The sync has written what it found queued when the write goes on.
        files.fails = lambda o: standing.set() if o.kind == "sync" else None
        await tier.sync()
        await writing
    finally:
        failpoints.disarm("storage.write")
    files.fails = lambda o: OSError(errno.EIO, "lost") if o.kind == "sync" else None
    with pytest.raises(OSError, match="lost"):
        await tier.sync()
    assert await tier.read(Place(2, 1)) is None
    assert await tier.read(Place(1, 1)) is not None
    await tier.close()
