"""Promise 4: what was purged stays dead, and the purge itself is forgotten only when that changes nothing."""

from __future__ import annotations

import random

import pytest

from kvstore.nouns import ISOLATE
from kvstore.tiers.base import Place
from kvstore.tiers.durable import AdvanceNote, PurgeNote
from kvstore.tiers.nvme import journal
from kvstore.tiers.nvme.journal import JOURNAL, load_journal
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, key_of, namespace_of
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline, World
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
    writing = tier.write(Place(1, 1), Block(1).frame())
    await writing
    await tier.note(ALL)
    await write(tier, Block(2))
    await tier.sync()
    assert await found_after(files_of(tier).world.as_it_is()) == [Block(2)]
    await tier.close()
