"""What is planned to be moved has room elsewhere, makes the room it was planned for, and costs little."""

from __future__ import annotations

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from kvstore.tiers.compaction import Plan, Zones, cheapest_window
from kvstore.tiers.extents import Extents
from tests.kvstore.tiers.pages import pages_taken


def never(_: int) -> bool:
    return False


class Arena:
    """Extents and zones as an arena keeps them, without bytes."""

    def __init__(self, n_pages: int) -> None:
        self.free = Extents(n_pages)
        self.zones = Zones(self.free)
        self.taken: dict[int, int] = {}

    def take(self, pages: int) -> int | None:
        first = self.free.take(pages)
        if first is not None:
            self.zones.add(first, pages)
            self.taken[first] = pages
        return first

    def give(self, first: int) -> None:
        self.zones.remove(first)
        self.free.give(first, self.taken.pop(first))

    def carry_out(self, plan: Plan) -> None:
        for move in plan.moves:
            assert self.taken.pop(move.first) == move.pages
            self.zones.remove(move.first)
            self.zones.add(move.to, move.pages)
            self.taken[move.to] = move.pages
        for run in [*plan.gaps, *((move.first, move.pages) for move in plan.moves)]:
            self.free.give(*run)

    def check(self) -> None:
        self.zones.check_integrity(self.taken.items())
        at = 0
        for first, pages in sorted([*self.taken.items(), *self.free.free_runs()]):
            assert first == at, "a page has no owner or two"
            at += pages
        assert at == self.free.n_pages


def comb(n_pages: int, tooth: int) -> Arena:
    """Every second of equal extents free: half of the pages, and no run longer than a tooth."""
    arena = Arena(n_pages)
    firsts = [arena.take(tooth) for _ in range(n_pages // tooth)]
    for first in firsts[::2]:
        arena.give(first or 0)
    return arena


def test_the_cheapest_window_is_between_what_stays() -> None:
    extents = [(0, 2), (4, 1), (7, 2), (10, 2), (13, 4)]
    assert cheapest_window(extents, 3, never) == [(4, 1)]
    assert cheapest_window(extents, 3, lambda first: first == 4) == [(7, 2)]
    assert cheapest_window(extents, 7, never) == [(4, 1), (7, 2)]
    assert cheapest_window(extents, 12, never) is None, "not even all that may be moved would do"
    assert cheapest_window(extents[:1], 1, never) is None


def test_nothing_as_long_as_the_run_is_moved_for_it() -> None:
    assert cheapest_window([(0, 1), (2, 3), (6, 1)], 3, never) is None


def test_a_comb_makes_room_for_what_is_longer_than_its_gaps() -> None:
    arena = comb(4096, 17)
    assert arena.take(361) is None
    plan = arena.zones.plan(361, never, 4096)
    assert plan is not None
    assert plan.pages < 2 * 361
    arena.carry_out(plan)
    assert arena.take(361) is not None
    arena.check()


def test_what_must_stay_stays_and_what_costs_too_much_is_not_begun() -> None:
    arena = comb(4096, 17)
    before = pages_taken(arena.free)
    assert arena.zones.plan(361, lambda _: True, 4096) is None
    assert arena.zones.plan(361, never, 100) is None
    assert pages_taken(arena.free) == before
    arena.check()


def test_without_room_elsewhere_nothing_is_taken() -> None:
    arena = Arena(64)
    firsts = [arena.take(8) for _ in range(8)]
    arena.give(firsts[1] or 0)
    arena.give(firsts[3] or 0)  # 16 pages free, in two halves, and the extent between fits in neither's rest
    before = pages_taken(arena.free)
    assert arena.take(10) is None
    assert arena.zones.plan(24, never, 64) is None, "all free pages would lie in the window itself"
    assert pages_taken(arena.free) == before
    arena.check()


def test_a_plan_costs_what_a_few_zones_hold() -> None:
    small, large = comb(1 << 13, 5), comb(1 << 18, 5)
    best = {}
    for arena in (small, large):
        arena.take(361)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            plan = arena.zones.plan(361, never, 4096)
            times.append(time.perf_counter() - started)
            assert plan is not None
            for run in [*plan.gaps, *((move.to, move.pages) for move in plan.moves)]:
                arena.free.give(*run)
            arena.free.take(1 << 30)  # joins what waits: not the plan's part
        best[arena] = min(times)
    assert best[large] < 8 * best[small] + 0.002, "32 times the arena, and the plan looked through all of it"


@given(
    st.integers(0, 1 << 30),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=80),
)
def test_any_history_leaves_every_page_with_one_owner(seed: int, steps: list[tuple[int, int]]) -> None:
    arena, rng = Arena(300), random.Random(seed)
    for kind, pages in steps:
        if kind == 0:
            arena.take(pages)
        elif kind == 1 and arena.taken:
            arena.give(rng.choice(list(arena.taken)))
        elif kind == 2 and arena.take(pages) is None:
            fixed = {first for first in arena.taken if rng.random() < 0.2}
            plan = arena.zones.plan(pages, fixed.__contains__, 300)
            if plan is not None:
                assert not fixed & {move.first for move in plan.moves}
                assert plan.pages < 2 * pages
                arena.carry_out(plan)
                assert arena.take(pages) is not None, "it was moved in vain"
        arena.check()
