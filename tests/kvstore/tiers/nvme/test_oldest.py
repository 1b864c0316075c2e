"""What rewriting a journal costs the event loop: one look at each segment, however many purges there are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, ItemsView
from pathlib import Path

import pytest

from kvstore.tiers.base import Place
from kvstore.tiers.durable import PurgeNote
from kvstore.tiers.nvme import oldest
from kvstore.tiers.nvme.notes import Purges, Scope
from kvstore.tiers.nvme.oldest import find_oldest
from kvstore.tiers.nvme.segment import Segment, Segments
from kvstore.tiers.nvme.threads import Result
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, key_of, namespace_of
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline
from tests.kvstore.tiers.nvme.history import small


class Looked(dict[Scope, int]):
    """A segment's scopes; counts who walks over them, and who asks for one."""

    count = 0

    def items(self) -> ItemsView[Scope, int]:  # type: ignore[override]
        self.count += 1
        return ItemsView(self)

    def get(self, key: Scope, default: int = 0) -> int:  # type: ignore[override]
        self.count += 1
        return super().get(key, default)


def segments_of(count: int, sequence: int) -> list[Segment]:
    """Each with two namespaces, old enough for every purge of theirs to be needed."""
    every = Segments()
    for i in range(count):
        segment = every.add(i, Path(f"/disk/{i}"), 1 << 20)
        segment.oldest = Looked({(namespace_of(n), 1): sequence + i for n in (0, 1)})
    return list(every.by_number.values())


class CountedThreads(Inline):
    """Who is asked to work in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.in_thread = False

    async def run(self, work: Callable[[], Result]) -> Result:
        await asyncio.sleep(0)
        self.in_thread = True
        try:
            return work()
        finally:
            self.in_thread = False


async def test_each_segment_is_looked_at_once_for_all_purges() -> None:
    segments = segments_of(400, 1_000)
    purges = Purges()
    for key in range(3_000):
        purges.add(PurgeNote(namespace_of(key % 3), (key_of(key),), key % 2 or None), key)
    found = await find_oldest(segments, [], [])
    purges.forget(found.is_needless)
    assert [segment.oldest.count for segment in segments if isinstance(segment.oldest, Looked)] == [1] * 400
    left = {int.from_bytes(key, "little") for of_scope in purges.keys.values() for key in of_scope}
    assert left == {key for key in range(1_001, 3_000) if key % 3 != 2}


async def test_a_rewrite_forgets_and_packs_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = CountedThreads()
    tier = NvmeTier(small(), CrashFiles(), threads, random.Random(0).getrandbits)
    await tier.recover()
    assert tier._opened is not None
    state = tier._opened.journal.state
    where: list[tuple[str, bool]] = []
    forget, documents = state.purges.forget, state.documents

    def forgets(needless: Callable[[Scope, int], bool]) -> None:
        where.append(("forget", threads.in_thread))
        forget(needless)

    def packs() -> list[object]:
        where.append(("pack", threads.in_thread))
        return documents()

    monkeypatch.setattr(state.purges, "forget", forgets)
    monkeypatch.setattr(state, "documents", packs)
    await tier.write(Place(0, 1), Block(0).frame())
    await tier.sync()
    assert where == [("forget", True), ("pack", True)]
    await tier.close()


async def test_the_pass_gives_way_and_misses_nothing_that_moves_meanwhile() -> None:
    """A copy is written, and its original's file removed, between two slices of the pass."""
    segments = segments_of(3, 10)
    by_number = {segment.number: segment for segment in segments}
    for segment in segments:
        segment.oldest = dict.fromkeys([(namespace_of(0), epoch) for epoch in range(20_000)], 50)
    original = segments[2]
    original.oldest[namespace_of(7), 1] = 5
    turns = 0

    async def move() -> None:
        nonlocal turns
        while not finding.done():
            turns += 1
            copies = by_number.setdefault(0, segments[0])
            copies.oldest[namespace_of(7), 1] = 5
            by_number.pop(original.number, None)
            await asyncio.sleep(0)

    finding = asyncio.create_task(find_oldest(by_number.values(), [], [100]))
    await asyncio.sleep(0)
    await move()
    assert turns >= 60_000 // oldest.SCOPES_A_TURN - 1
    found = await finding
    assert not found.is_needless((namespace_of(7), None), 6)
    assert found.is_needless((namespace_of(7), 1), 5)
    assert found.is_needless((namespace_of(9), None), 100)
    assert not found.is_needless((namespace_of(9), None), 101), "a write that is in no queue yet"
