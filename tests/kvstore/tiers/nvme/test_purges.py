"""Promise 4: what was purged stays dead, and the purge itself is forgotten only when that changes nothing."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from kvstore import failpoints
from kvstore.errors import ConfigError
from kvstore.nouns import ISOLATE
from kvstore.tiers.base import Place
from kvstore.tiers.durable import AdvanceNote, PurgeNote
from kvstore.tiers.nvme import journal
from kvstore.tiers.nvme.journal import JOURNAL, load_journal
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, key_of, namespace_of
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline, Operation, World
from tests.kvstore.tiers.nvme.history import DIRECTORY, blocks_of, small

ALL = PurgeNote(namespace_of(0), None, None)


@pytest.fixture(autouse=True)
def _journals_are_rewritten_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "GROWTH_NBYTES", 0)


def tier_over(files: CrashFiles) -> NvmeTier:
    return NvmeTier(small(), files, Inline(), random.Random(0).getrandbits)


async def started() -> NvmeTier:
    tier = tier_over(CrashFiles())
    await tier.recover()
    return tier


def files_of(tier: NvmeTier) -> CrashFiles:
    assert isinstance(tier.files, CrashFiles)
    return tier.files


async def write(tier: NvmeTier, *blocks: Block) -> None:
    for block in blocks:
        await tier.write(Place(block.key, 1), block.frame())


async def rewrite_journal(tier: NvmeTier) -> None:
    before = sum(operation.kind == "rename" for operation in files_of(tier).log)
    for number in range(20):
        await tier.note(AdvanceNote("model", number, ISOLATE))
    assert sum(operation.kind == "rename" for operation in files_of(tier).log) > before


def purges_in_journal(files: CrashFiles) -> int:
    _, state, _ = load_journal(DIRECTORY / "0" / JOURNAL, files)
    return len(list(state.purges.notes()))


async def found_after(world: World) -> list[Block]:
    tier = tier_over(CrashFiles(world))
    found = blocks_of(await tier.recover())
    await tier.close()
    return found


async def test_a_purge_outlives_frames_that_were_still_queued() -> None:
    tier = await started()
    await write(tier, Block(1))
    await tier.note(ALL)
    await rewrite_journal(tier)
    assert purges_in_journal(files_of(tier)) == 1
    await write(tier, Block(2))
    await tier.sync()
    assert await found_after(files_of(tier).world.as_it_is()) == [Block(2)]
    await tier.close()


async def test_a_purge_is_forgotten_when_nothing_is_left_that_it_could_kill() -> None:
    tier = await started()
    await write(tier, *map(Block, range(40)))
    await tier.sync()
    await tier.note(ALL)
    await tier.note(PurgeNote(namespace_of(0), (key_of(1),), None))
    await rewrite_journal(tier)
    assert purges_in_journal(files_of(tier)) == 2
    for key in range(40):
        tier.discard(Place(key, 1))
    await write(tier, *(Block(key, namespace=1) for key in range(100, 120)))
    await tier.sync()
    await rewrite_journal(tier)
    assert purges_in_journal(files_of(tier)) == 2, "the last of them share a segment with what lives"
    for key in range(100, 110):
        tier.discard(Place(key, 1))
    await write(tier, *(Block(key, namespace=1) for key in range(120, 140)))
    await tier.sync()
    await rewrite_journal(tier)
    assert purges_in_journal(files_of(tier)) == 0
    for seed in range(20):  # and does not come back with the directory's unsynced changes
        found = await found_after(files_of(tier).world.survivor(random.Random(seed)))
        assert {block.namespace for block in found} == {1}
    await tier.close()


async def test_a_copy_is_as_old_as_its_original() -> None:
    tier = await started()
    await write(tier, *map(Block, range(30)))
    await tier.sync()
    await tier.note(PurgeNote(namespace_of(0), (key_of(0), key_of(20)), None))
    # The purged ones are not discarded: reclaiming copies them out as well.
    for key in range(1, 20):
        tier.discard(Place(key, 1))
    filled = range(100, 160, 2)
    for key in range(100, 160):
        await write(tier, Block(key))
        await tier.sync()
        if key % 2:
            tier.discard(Place(key, 1))
    assert tier.counters["copied_nbytes"] > 0
    found = await found_after(files_of(tier).world.as_it_is())
    assert {block.key for block in found} >= {*range(21, 30), *filled}
    assert not {block.key for block in found} & {0, 20}
    await tier.close()


async def test_a_purge_counts_for_writes_that_began_before_it() -> None:
    """A write takes its place in the order when it is called, wherever it waits."""
    tier = await started()
    standing = asyncio.Event()
    with failpoints.armed("storage.write", failpoints.Delay(standing)):
        writing = asyncio.create_task(write(tier, Block(1)))
        await asyncio.sleep(0)  # called, and not queued yet
        await tier.note(ALL)
        await rewrite_journal(tier)
        assert purges_in_journal(files_of(tier)) == 1
        standing.set()
        await writing
    await write(tier, Block(2))
    await tier.sync()
    assert await found_after(files_of(tier).world.as_it_is()) == [Block(2)]
    await tier.close()


async def test_a_purge_is_kept_while_a_removed_file_may_come_back() -> None:
    """Its directory could not be synced: after a crash the segment may be there again."""
    tier = await started()
    files = files_of(tier)
    await write(tier, *map(Block, range(20)))
    await tier.sync()
    await tier.note(ALL)
    for key in range(20):
        tier.discard(Place(key, 1))
    failed: list[Operation] = []

    def fails(operation: Operation) -> OSError | None:
        if operation.kind != "names" or files.log[-1].kind != "unlink":
            return None
        failed.append(operation)
        return OSError(errno.EIO, "lost")

    files.fails = fails
    await write(tier, *(Block(key, namespace=1) for key in range(100, 120)))
    await tier.sync()
    assert failed
    files.fails = lambda _: None
    for key in range(100, 110):
        tier.discard(Place(key, 1))
    await write(tier, *(Block(key, namespace=1) for key in range(120, 140)))
    await tier.sync()
    assert tier.counters["segments_removed"] >= 2, "the sync that failed was tried again"
    await rewrite_journal(tier)
    assert purges_in_journal(files) == 1, "and is not believed"
    await tier.close()


async def test_a_note_that_is_kept_is_in_the_file_that_is_found() -> None:
    """The journal was rewritten just before: its new name is durable, too."""
    tier = await started()
    await write(tier, *map(Block, range(3)))
    await tier.sync()
    for seed in range(20):
        await tier.note(PurgeNote(namespace_of(0), (key_of(seed % 4),), None))
        found = await found_after(files_of(tier).world.survivor(random.Random(seed)))
        assert {block.key for block in found} == set(range(3)) - set(range(seed + 1))
    await tier.close()


async def test_a_purge_is_forgotten_when_its_files_are_gone_for_good_on_every_disk() -> None:
    """A rewritten journal syncs its own directory, and no other one."""
    files = CrashFiles()
    tier = NvmeTier(small(2), files, Inline(), random.Random(0).getrandbits)
    await tier.recover()
    await write(tier, *map(Block, range(60)))
    await tier.sync()
    await tier.note(ALL)
    for key in range(60):
        tier.discard(Place(key, 1))
    for first in range(100, 160, 4):
        await write(tier, *(Block(key, namespace=1) for key in range(first, first + 4)))
        await tier.sync()
        if purges_in_journal(files):
            await tier.note(AdvanceNote("model", first, ISOLATE))
            continue
        for seed in range(20):
            left = CrashFiles(files.world.survivor(random.Random(seed)))
            again = NvmeTier(small(2), left, Inline())
            assert {block.namespace for block in blocks_of(await again.recover())} == {1}
            await again.close()
        break
    assert purges_in_journal(files) == 0
    await tier.close()


async def test_a_purge_is_kept_while_a_file_may_hold_records_that_nobody_knows_of() -> None:
    """A read failed while it was scanned. The next start may succeed."""
    tier = await started()
    await write(tier, *map(Block, range(3)))
    await tier.sync()
    await tier.note(ALL)
    left = files_of(tier).world.as_it_is()
    await tier.close()
    files = CrashFiles(left)
    again = tier_over(files)
    files.fails = lambda o: OSError(errno.EIO, "bad") if o.kind == "read" and o.offset else None
    assert blocks_of(await again.recover()) == []
    files.fails = lambda _: None
    await rewrite_journal(again)  # before anything is written: the file is still there
    assert purges_in_journal(files) == 1
    assert await found_after(files.world.as_it_is()) == []
    await again.close()


async def test_a_journal_that_knows_less_than_a_record_did_is_refused() -> None:
    """An older copy of it was put back: a purge may be missing."""
    tier = await started()
    await write(tier, Block(1))
    await tier.sync()
    old = files_of(tier).world.as_it_is()
    await tier.note(ALL)
    await write(tier, Block(2))
    await tier.sync()
    world = files_of(tier).world.as_it_is()
    path = str(DIRECTORY / "0" / JOURNAL)
    world.inodes[world.names[path]] = old.inodes[old.names[path]]
    with pytest.raises(ConfigError, match="damaged"):
        await found_after(world)
    await tier.close()


async def killed_at_an_unlink() -> World:
    """Before its directory was synced; all that the file held had been purged."""
    tier = await started()
    await write(tier, *map(Block, range(6)))  # just fill a segment
    await tier.sync()
    await tier.note(ALL)
    for key in range(6):
        tier.discard(Place(key, 1))
    await write(tier, *(Block(key, namespace=1) for key in range(100, 110)))
    await tier.sync()
    await tier.close()
    world, log = World(), files_of(tier).log
    for operation in log[: 1 + [operation.kind for operation in log].index("unlink")]:
        world.apply(operation)
    return world


async def test_a_file_that_a_killed_process_unlinked_stays_gone() -> None:
    """The next life does not find it and forgets the purge; then power fails."""
    world = await killed_at_an_unlink()
    files = CrashFiles(world.as_it_is())
    again = tier_over(files)
    await again.recover()
    await again.note(AdvanceNote("model", 1, ISOLATE))
    assert purges_in_journal(files) == 0
    for operation in [*files.log, None]:
        for seed in range(10):
            found = await found_after(world.survivor(random.Random(seed)))
            assert {block.namespace for block in found} <= {1}
        if operation is not None:
            world.apply(operation)
    await again.close()


async def test_a_purge_is_kept_where_a_start_cannot_sync_a_directory() -> None:
    files = CrashFiles((await killed_at_an_unlink()).as_it_is())
    again = tier_over(files)
    files.fails = lambda o: OSError(errno.EIO, "lost") if o.kind == "names" else None
    await again.recover()
    files.fails = lambda _: None
    await again.note(AdvanceNote("model", 1, ISOLATE))
    assert again.counters["directory_sync_error"] == 1
    assert purges_in_journal(files) == 1
    await again.close()
