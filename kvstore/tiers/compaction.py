"""Which extents to move so that an arena's free pages become one run that is long enough.

Called for when a frame found no room although there are pages enough. An arena is seen in zones of 4 MiB,
of which it is known how full each is. In the emptiest few the cheapest *window* is looked for: neighbouring
extents whose removal leaves a long enough run between two that stay (the evacuation of Linux's page
compaction and of regional garbage collectors, at the size that is needed instead of a whole region). Only
extents shorter than the run go: what is moved for a run must not be as hard to place as the run. Room for
all of them is taken elsewhere before anything is copied, so that no copy is in vain.

    take(3) -> None                aa..b..cc.dd..eeee
    window between aa and cc       aa[..b..]cc.dd..eeee      one page to move, five come together
    b to the best fit elsewhere    aa.....ccbdd..eeee

Costs what CANDIDATES zones hold, not what the arena holds: about 1 ms at frames of 20 KiB. Less
than 2 n pages are moved for a run of n.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np

from kvstore.tiers.extents import Extents

ZONE_PAGES: Final = 1024
CANDIDATES: Final = 8


class Move(NamedTuple):
    first: int
    pages: int
    to: int  # taken already


class Plan(NamedTuple):
    """Give back, when it is done: the gaps, the old place of what was moved, the new of what was not."""

    moves: list[Move]
    gaps: list[tuple[int, int]]  # free runs of the window, withheld so that nothing moves into them

    @property
    def pages(self) -> int:
        """To be copied."""
        return sum(move.pages for move in self.moves)


class Zones:
    """Every extent that is taken, by the zone it begins in."""

    def __init__(self, free: Extents) -> None:
        self._free = free
        n_zones = max(1, -(-free.n_pages // ZONE_PAGES))
        self._taken = array("l", bytes(n_zones * array("l").itemsize))  # pages, by zone
        self._begins: list[dict[int, int]] = [{} for _ in range(n_zones)]  # first -> pages

    def add(self, first: int, pages: int) -> None:
        self._begins[first // ZONE_PAGES][first] = pages
        self._count(first, pages, 1)

    def remove(self, first: int) -> int:
        """How many pages it has."""
        pages = self._begins[first // ZONE_PAGES].pop(first)
        self._count(first, pages, -1)
        return pages

    def plan(self, pages: int, stays: Callable[[int], bool], pages_max: int) -> Plan | None:
        """How to come to a free run of `pages`, moving at most `pages_max`. `stays(first)`: not to be moved.

        None: no way was found among the emptiest zones. Nothing is taken then.
        """
        span = -(-pages // ZONE_PAGES) + 1
        windows = []
        for zone in self._emptiest(span):
            found = cheapest_window(self._extents(zone, span), pages, stays)
            if found is not None and sum(n for _, n in found) <= pages_max:
                windows.append(found)
        for window in sorted(windows, key=lambda window: sum(n for _, n in window)):
            plan = self._with_room(window)
            if plan is not None:
                return plan
        return None

    def check_integrity(self, extents: Iterable[tuple[int, int]]) -> None:
        """Just these are known, and counted where they lie."""
        fresh = Zones(self._free)
        for extent in extents:
            fresh.add(*extent)
        assert fresh._begins == self._begins, "the zones know other extents than there are"
        assert fresh._taken == self._taken, "a zone's pages are miscounted"

    def _emptiest(self, span: int) -> list[int]:
        """The first zone of each of the emptiest runs of `span` zones."""
        taken = np.frombuffer(self._taken, dtype=np.dtype("l"))
        if len(taken) <= span:
            return [0]
        ends = np.concatenate([[0], np.cumsum(taken)])
        sums = ends[span:] - ends[:-span]
        count = min(CANDIDATES, len(sums))
        best: list[int] = np.argpartition(sums, count - 1)[:count].tolist()
        return best

    def _extents(self, zone: int, span: int) -> list[tuple[int, int]]:
        return [pair for begins in self._begins[zone : zone + span] for pair in sorted(begins.items())]

    def _with_room(self, window: list[tuple[int, int]]) -> Plan | None:
        """Room elsewhere for all of the window's extents, the longest first."""
        gaps = self._free.withhold_around(window)
        moves: list[Move] = []
        for first, pages in sorted(window, key=lambda extent: -extent[1]):
            to = self._free.take(pages)
            if to is None:
                for run in [*gaps, *((move.to, move.pages) for move in moves)]:
                    self._free.give(*run)
                return None
            moves.append(Move(first, pages, to))
        return Plan(moves, gaps)

    def _count(self, first: int, pages: int, sign: int) -> None:
        end = first + pages
        while first < end:
            zone = first // ZONE_PAGES
            until = min(end, (zone + 1) * ZONE_PAGES)
            self._taken[zone] += sign * (until - first)
            first = until


def cheapest_window(
    extents: list[tuple[int, int]], pages: int, stays: Callable[[int], bool]
) -> list[tuple[int, int]] | None:
    """Neighbours among `extents` (ascending) with the fewest pages that, moved, leave `pages` free in a row.

    The first and the last extent stay: what lies beyond them is not known here.
    """
    best: tuple[int, int, int] | None = None  # pages to move, begin, end
    begin, held = 1, 0  # the window is extents[begin:end], and `held` its pages
    for end in range(1, len(extents)):
        while begin < end and extents[end][0] - sum(extents[begin]) >= pages:  # long enough without it
            held -= extents[begin][1]
            begin += 1
        room = extents[end][0] - sum(extents[begin - 1])
        if room >= pages and begin < end and (best is None or held < best[0]):
            best = held, begin, end
        if extents[end][1] >= pages or stays(extents[end][0]):
            begin, held = end + 1, 0
        else:
            held += extents[end][1]
    return None if best is None else extents[best[1] : best[2]]
