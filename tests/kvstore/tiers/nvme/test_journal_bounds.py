"""The journal never outgrows what a start reads back: a note that would is refused, and was not noted."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from kvstore.errors import Unavailable
from kvstore.notes import Notes
from kvstore.nouns import ISOLATE, ShardId
from kvstore.tiers.base import Place
from kvstore.tiers.durable import AdvanceNote, EpochNote, Note, PurgeNote
from kvstore.tiers.nvme import journal
from kvstore.tiers.nvme.journal import JOURNAL, load_journal
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, epoch_of, key_of, namespace_of
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline
from tests.kvstore.tiers.nvme.history import DIRECTORY, blocks_of, small

AT = DIRECTORY / "0" / JOURNAL


async def started(files: CrashFiles) -> NvmeTier:
    tier = NvmeTier(small(), files, Inline(), random.Random(0).getrandbits)
    await tier.recover()
    return tier


async def with_a_block(files: CrashFiles) -> NvmeTier:
    """Its one segment keeps every purge of namespace 0 needed."""
    tier = await started(files)
    await tier.write(Place(0, 1), Block(0).frame())
    await tier.sync()
    return tier


def purge_of(*keys: int, namespace: int = 0) -> PurgeNote:
    return PurgeNote(namespace_of(namespace), tuple(map(key_of, keys)), None)


async def refused(tier: NvmeTier, note: Note, files: CrashFiles) -> str:
    """Why. Nothing of it has reached the disk."""
    before = len(files.log)
    with pytest.raises(OSError, match=r".") as raised:
        await tier.note(note)
    assert raised.value.errno == errno.ENOSPC
    assert not [o for o in files.log[before:] if o.kind in ("write", "size")]
    return str(raised.value)


async def test_a_journal_that_is_full_can_still_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = CrashFiles()
    tier = await with_a_block(files)
    monkeypatch.setattr(journal, "JOURNAL_NBYTES_MAX", 8_000)
    taken = 60
    for key in range(1, taken + 1):
        await tier.note(purge_of(key))
    told = await asyncio.gather(
        *(tier.note(purge_of(key)) for key in range(taken + 1, 200)), return_exceptions=True
    )
    refusals = [one for one in told if one is not None]
    assert refusals
    assert all(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in refusals)
    taken = 199 - len(refusals)
    assert len(files.world.inodes[files.world.names[str(AT)]].live) <= 8_000
    await tier.close()
    _, state, _ = load_journal(AT, CrashFiles(files.world.as_it_is()))
    assert set(state.purges.keys[namespace_of(0), None]) == set(map(key_of, range(1, taken + 1)))
    again = await started(CrashFiles(files.world.as_it_is()))
    await again.close()


async def test_a_journal_whose_purges_are_needless_is_rewritten_before_anybody_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = CrashFiles()
    tier = await with_a_block(files)
    monkeypatch.setattr(journal, "JOURNAL_NBYTES_MAX", 8_000)
    for key in range(300):
        await tier.note(purge_of(key, namespace=1))
    assert len(files.world.inodes[files.world.names[str(AT)]].live) <= 8_000
    await tier.close()


async def test_purged_keys_are_counted_and_forgotten_before_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "PURGED_KEYS_MAX", 100)
    files = CrashFiles()
    tier = await with_a_block(files)
    await tier.note(purge_of(*range(60)))
    await tier.note(purge_of(*range(39), namespace=1))
    await tier.note(purge_of(*range(50, 90)))  # 30 new ones: those of namespace 1 are forgotten
    assert "100" in await refused(tier, purge_of(*range(100, 111)), files)
    await tier.note(purge_of(*range(90)))  # known ones: counted once
    await tier.note(purge_of(*range(90, 100)))
    await tier.note(PurgeNote(namespace_of(0), None, None))  # a whole scope always goes
    await tier.note(AdvanceNote("model", 1, ISOLATE))
    await refused(tier, purge_of(100), files)
    await tier.close()
    _, state, _ = load_journal(AT, CrashFiles(files.world.as_it_is()))
    assert set(state.purges.keys[namespace_of(0), None]) == set(map(key_of, range(100)))


async def test_a_refused_note_takes_no_other_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    files = CrashFiles()
    tier = await with_a_block(files)
    monkeypatch.setattr(journal, "ENTRY_NBYTES_MAX", 1_000)
    await refused(tier, purge_of(*range(40)), files)
    await refused(tier, EpochNote("m" * 1_000, epoch_of(1)), files)
    await tier.note(purge_of(*range(20)))
    await tier.write(Place(1, 1), Block(99).frame())
    await tier.sync()
    await tier.close()
    found = await NvmeTier(small(), files, Inline(), random.Random(1).getrandbits).recover()
    assert blocks_of(found) == [Block(99)]
    assert not found.notes


async def test_a_rewrite_that_would_not_be_read_leaves_the_journal_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = CrashFiles()
    tier = await with_a_block(files)
    await tier.note(purge_of(*range(500)))
    await tier.close()
    monkeypatch.setattr(journal, "JOURNAL_NBYTES_MAX", 20_000)
    tier = await started(files)
    monkeypatch.setattr(journal, "JOURNAL_NBYTES_MAX", 10_000)
    old = bytes(files.world.inodes[files.world.names[str(AT)]].live)
    assert "still matter" in await refused(tier, purge_of(1000), files)
    assert bytes(files.world.inodes[files.world.names[str(AT)]].live) == old
    monkeypatch.setattr(journal, "JOURNAL_NBYTES_MAX", 40_000)
    await tier.note(purge_of(1000))
    await tier.close()


async def test_who_purges_is_told_that_it_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "PURGED_KEYS_MAX", 2)
    tier = await with_a_block(CrashFiles())
    notes = Notes(ShardId("shard-0"), tier)
    with pytest.raises(Unavailable, match="purge whole epochs or namespaces"):
        await notes.keep(purge_of(1, 2, 3))
    await notes.keep(purge_of(1, 2))
    await tier.close()
