"""Which bytes of an arena are taken: page-aligned extents, reused before fresh ones are touched.

An extent that comes free waits in a list of its own size, and the next frame of that size takes the one
that came free last: O(1), and its pages are there already (a fresh page of a virtual machine costs up to
6 ms a MiB, benchmarks/store figures in docs/design.md). When no list has the size, the shortest free run
that is long enough gives it; when none is, what waits is joined with the runs beside it and the search is
repeated once. What was joined stays joined: an extent is joined once for every time it came free.
Never raises for want of room: the answer is None, and the caller has somewhere else to put its frame.

    total = 8 pages                 ........
    take(2) -> 0                    aa......
    take(3) -> 2                    aabbb...
    give(0, 2)                      ..bbb...   kept for the next extent of two pages
    take(2) -> 0                    aabbb...   the same pages again
    give(0, 2), take(1) -> 5        ..bbbc..   first from runs: page 0 waits for another pair
    take(3) -> None, take(2) -> 0              but a pair is still to be had
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

PAGE_NBYTES: Final = 4096


class Extents:
    """Page numbers [0, n_pages): each is taken, or in one free run."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._waiting: dict[int, list[int]] = {}  # pages -> first pages of free extents of that size
        self._runs: dict[int, int] = {}  # first -> pages; no run touches another
        self._first_of: dict[int, int] = {}  # the page after a run -> its first
        self._by_pages: dict[int, dict[int, None]] = {}  # pages -> first pages of the runs of that length
        self._lengths: list[int] = []  # of the runs, each once, ascending
        if n_pages:
            self._add_run(0, n_pages)

    def take(self, pages: int) -> int | None:
        """The first page of an extent of `pages`, or None when no free run is that long."""
        if pages < 1:
            raise ValueError(f"an extent of {pages} pages")
        first = self._reuse(pages)
        if first is None:
            first = self._best_fit(pages)
        if first is None and self._waiting:
            self._merge()
            first = self._best_fit(pages)
        return first

    def give(self, first: int, pages: int) -> None:
        """Take an extent back. It must be one that `take` answered, of the same size."""
        self._waiting.setdefault(pages, []).append(first)

    def free_runs(self) -> list[tuple[int, int]]:
        """Every free run, (first, pages) in ascending order, merged."""
        loose = [(first, pages) for pages, firsts in self._waiting.items() for first in firsts]
        merged: list[tuple[int, int]] = []
        for first, pages in sorted([*self._runs.items(), *loose]):
            if merged and sum(merged[-1]) == first:
                merged[-1] = merged[-1][0], merged[-1][1] + pages
            else:
                merged.append((first, pages))
        return merged

    def withhold_around(self, extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The free runs beside these neighbouring extents, taken, each to be given back: so that whoever
        empties this part of the arena does not move anything into it."""
        self._merge()
        first_pages = [extents[0][0], *(first + pages for first, pages in extents)]
        before = self._first_of.get(first_pages[0])
        if before is not None:
            first_pages[0] = before
        return [(first, self._remove_run(first)) for first in first_pages if first in self._runs]

    def _reuse(self, pages: int) -> int | None:
        waiting = self._waiting.get(pages)
        if not waiting:
            return None
        first = waiting.pop()
        if not waiting:
            del self._waiting[pages]
        return first

    def _best_fit(self, pages: int) -> int | None:
        at = bisect_left(self._lengths, pages)
        if at == len(self._lengths):
            return None
        run = self._lengths[at]
        first = next(reversed(self._by_pages[run]))
        self._remove_run(first)
        if run > pages:
            self._add_run(first + pages, run - pages)
        return first

    def _merge(self) -> None:
        """Join what waits with the runs beside it: costs what waits, not what is free."""
        for pages, firsts in self._waiting.items():
            for first in firsts:
                start, end = first, first + pages
                before = self._first_of.get(start)
                if before is not None:
                    self._remove_run(before)
                    start = before
                if end in self._runs:
                    end += self._remove_run(end)
                self._add_run(start, end - start)
        self._waiting.clear()

    def _add_run(self, first: int, pages: int) -> None:
        self._runs[first] = pages
        self._first_of[first + pages] = first
        if pages not in self._by_pages:
            self._by_pages[pages] = {}
            insort(self._lengths, pages)
        self._by_pages[pages][first] = None

    def _remove_run(self, first: int) -> int:
        """How long it was."""
        pages = self._runs.pop(first)
        del self._first_of[first + pages]
        same = self._by_pages[pages]
        del same[first]
        if not same:
            del self._by_pages[pages]
            del self._lengths[bisect_left(self._lengths, pages)]
        return pages
