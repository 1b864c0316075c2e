"""Which bytes of an arena are taken: page-aligned extents, reused before fresh ones are touched.

An extent that comes free waits in a list of its own size, and the next frame of that size takes the one
that came free last: O(1), and its pages are there already (a fresh page of a virtual machine costs up to
6 ms a MiB, benchmarks/store figures in docs/design.md). When no list has the size, the lowest free run that
is long enough gives it; when none is, the lists are merged into runs and the search is repeated once.
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

from typing import Final

PAGE_NBYTES: Final = 4096


class Extents:
    """Page numbers [0, n_pages). Conservation: taken + free == n_pages."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.n_taken = 0
        self._runs: list[tuple[int, int]] = [(0, n_pages)] if n_pages else []  # (first, pages), ascending
        self._waiting: dict[int, list[int]] = {}  # pages -> first pages of free extents of that size
        self._longest = n_pages  # no run is longer than this

    def take(self, pages: int) -> int | None:
        """The first page of an extent of `pages`, or None when no free run is that long."""
        if pages < 1:
            raise ValueError(f"an extent of {pages} pages")
        first = self._reuse(pages)
        if first is None:
            first = self._first_fit(pages)
        if first is None and self._waiting:
            self._merge()
            first = self._first_fit(pages)
        if first is not None:
            self.n_taken += pages
        return first

    def give(self, first: int, pages: int) -> None:
        """Take an extent back. It must be one that `take` answered, of the same size."""
        self._waiting.setdefault(pages, []).append(first)
        self.n_taken -= pages

    def free_runs(self) -> list[tuple[int, int]]:
        """Every free run, (first, pages) in ascending order, merged."""
        loose = [(first, pages) for pages, firsts in self._waiting.items() for first in firsts]
        merged: list[tuple[int, int]] = []
        for first, pages in sorted(self._runs + loose):
            if merged and sum(merged[-1]) == first:
                merged[-1] = merged[-1][0], merged[-1][1] + pages
            else:
                merged.append((first, pages))
        return merged

    def _reuse(self, pages: int) -> int | None:
        waiting = self._waiting.get(pages)
        if not waiting:
            return None
        first = waiting.pop()
        if not waiting:
            del self._waiting[pages]
        return first

    def _first_fit(self, pages: int) -> int | None:
        if pages > self._longest:
            return None
        longest = 0
        for i, (first, run) in enumerate(self._runs):
            if run >= pages:
                if run == pages:
                    del self._runs[i]
                else:
                    self._runs[i] = first + pages, run - pages
                return first
            longest = max(longest, run)
        self._longest = longest
        return None

    def _merge(self) -> None:
        self._runs = self.free_runs()
        self._waiting.clear()
        self._longest = max((run for _, run in self._runs), default=0)
