"""A namespace is known to the next life as long as something of it is on a disk, and no longer."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.hashing import digest16
from kvstore.notes import Notes
from kvstore.nouns import DROP, ShardId
from kvstore.tiers.base import Place
from kvstore.tiers.durable import AdvanceNote, EpochNote, NamespaceNote, Note, PurgeNote, Recovered
from kvstore.tiers.nvme import journal
from kvstore.tiers.nvme.journal import JOURNAL, load_journal
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.test_starting import E1, KV, SPEC, TOKENS, all_moved, life, settings
from tests.kvstore.tiers.nvme.blocks import Block, epoch_of, namespace_of
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline
from tests.kvstore.tiers.nvme.history import DIRECTORY, LAYOUT, small


def opened(number: int) -> NamespaceNote:
    return NamespaceNote(namespace_of(number), "m", f"tenant-{number}", LAYOUT)


async def started(files: CrashFiles, seed: int = 0) -> tuple[NvmeTier, Recovered]:
    tier = NvmeTier(small(), files, Inline(), random.Random(seed).getrandbits)
    return tier, await tier.recover()


def namespaces(found: Recovered) -> list[int]:
    return [int.from_bytes(note.id, "little") for note in found.notes if isinstance(note, NamespaceNote)]


async def test_a_namespace_of_which_nothing_is_left_is_forgotten_at_start() -> None:
    files = CrashFiles()
    tier, _ = await started(files)
    bound, advanced = EpochNote("m", epoch_of(1)), AdvanceNote("m", 1, DROP)
    every: list[Note] = [*map(opened, range(50)), bound, advanced]
    for note in every:
        await tier.note(note)
    await tier.write(Place(0, 1), Block(0, namespace=7).frame())
    await tier.write(Place(1, 1), Block(1, namespace=9).frame())
    await tier.sync()
    tier.discard(Place(1, 1))
    await tier.note(PurgeNote(namespace_of(9), None, None))
    await tier.note(PurgeNote(namespace_of(11), None, None))
    await tier.close()
    for seed in (1, 2):
        tier, found = await started(files, seed)
        assert list(found.notes) == [opened(7), opened(9), bound, advanced], "a dead record is a record"
        await tier.note(opened(7))  # rewrites
        await tier.close()
    _, state, _ = load_journal(DIRECTORY / "0" / JOURNAL, files)
    assert [note for note in state.notes() if isinstance(note, NamespaceNote)] == [opened(7), opened(9)]
    assert [note.namespace for note, _ in state.purges.notes()] == [namespace_of(9)]


async def test_a_forgotten_namespace_is_noted_again_and_its_blocks_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "GROWTH_NBYTES", 0)
    files = CrashFiles()
    tier, _ = await started(files)
    await tier.note(opened(3))
    await tier.close()
    tier, found = await started(files, 1)
    assert namespaces(found) == []
    notes = Notes(ShardId("shard-0"), tier)
    notes.replayed(found.notes)
    assert notes.lack(opened(3))
    await notes.keep(opened(3))
    assert not notes.lack(opened(3))
    await tier.write(Place(0, 1), Block(0, namespace=3).frame())
    await tier.sync()
    for number in range(30):  # rewrites in the same life forget no namespace, though nothing of it is there
        await notes.keep(EpochNote("m", epoch_of(number)))
        await notes.keep(opened(4))
    for at_crash in (files.world.as_it_is(), files.world.survivor(random.Random(0))):
        again, found = await started(CrashFiles(at_crash), 2)
        assert namespaces(found) == [3]
        assert len(found.blocks) == 1
        await again.close()
    _, state, _ = load_journal(DIRECTORY / "0" / JOURNAL, files)
    assert opened(4) in state.notes()
    await tier.close()


async def test_nothing_is_forgotten_while_a_segment_is_opaque() -> None:
    files = CrashFiles()
    tier, _ = await started(files)
    await tier.note(opened(5))
    await tier.write(Place(0, 1), Block(0, namespace=7).frame())
    await tier.sync()
    left = files.world.as_it_is()  # the segment is open: it has no footer
    await tier.close()
    unreadable = CrashFiles(left)
    segment = next(file for name, file in left.names.items() if "segment-" in name)
    unreadable.fails = lambda o: OSError(5, "EIO") if o.file == segment and o.kind == "read" else None
    tier, found = await started(unreadable, 1)
    assert namespaces(found) == [5]
    assert not found.blocks
    await tier.close()


async def test_a_shard_that_sees_many_tenants_does_not_carry_them_along(tmp_path: Path) -> None:
    async with life(settings(tmp_path)) as (session, client, driver):
        await session.put(TOKENS, KV)
        await all_moved(driver)
        for number in range(20):
            await client.open(replace(SPEC, tokenizer_digest=digest16(f"tokenizer {number}")), E1)
        assert len(driver.core.index.spaces) == 21
    async with life(settings(tmp_path)) as (session, client, driver):
        assert len(driver.core.index.spaces) == 1
        assert (await session.get(TOKENS)).n_tokens >= 32
        other = await client.open(replace(SPEC, tokenizer_digest=digest16("tokenizer 3")), E1)
        await other.put(TOKENS, KV)
        await all_moved(driver)
    async with life(settings(tmp_path)) as (session, client, driver):
        assert len(driver.core.index.spaces) == 2
        other = await client.open(replace(SPEC, tokenizer_digest=digest16("tokenizer 3")), E1)
        assert (await other.get(TOKENS)).n_tokens >= 32
