"""Every page of an arena is free or taken, never both, and freed pages are used before fresh ones."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.tiers.extents import Extents


def test_the_worked_example() -> None:
    extents = Extents(8)
    assert (extents.take(2), extents.take(3)) == (0, 2)
    extents.give(0, 2)
    assert extents.take(2) == 0, "the same pages again"
    extents.give(0, 2)
    assert extents.take(1) == 5, "pages 0 and 1 wait for another pair"
    assert extents.take(3) is None
    assert extents.take(2) == 0


def test_neighbours_that_come_free_are_one_again() -> None:
    extents = Extents(6)
    for first in (0, 2, 4):
        assert extents.take(2) == first
    for first in (2, 0, 4):
        extents.give(first, 2)
    assert extents.take(6) == 0


def test_what_finds_no_room_does_not_look_through_everything_each_time() -> None:
    extents = Extents(60_000)
    pairs = [extents.take(2) for _ in range(30_000)]
    for first in pairs[::4]:
        extents.give(first or 0, 2)
    assert extents.take(3) is None
    started = time.perf_counter()
    for first in pairs[2:4000:4]:
        extents.give(first or 0, 2)
        assert extents.take(3) is None
    assert time.perf_counter() - started < 0.5, "every failing take merged all free extents again"
    extents.give(pairs[1] or 0, 2)
    assert extents.take(6) == 0


def test_an_extent_without_pages_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="0 pages"):
        Extents(4).take(0)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=60))
def test_no_page_is_taken_twice_or_lost(steps: list[tuple[bool, int]]) -> None:
    extents, taken = Extents(24), []
    for take, n in steps:
        if take:
            first = extents.take(n)
            if first is not None:
                taken.append((first, n))
            else:
                assert all(run < n for _, run in extents.free_runs()), "room was there and not found"
        elif taken:
            extents.give(*taken.pop(n % len(taken)))
        pages = [page for first, n in [*taken, *extents.free_runs()] for page in range(first, first + n)]
        assert sorted(pages) == list(range(24))
