"""How much of an arena frames can fill, and what finding room costs: best-fit extents, buddies and slabs.

    python -m benchmarks.allocators [--arena-mib N] [--seeds N] [--json]

No memory is touched: pages are numbers. Frames of mixed sizes come and go (see MIXES); every allocator sees
the same histories. The first table lets each do what it can; the second asks what the arena does: the core
evicts by a byte budget, the arena is `slack` larger, and a frame that finds no room lies elsewhere.

- *first failure*: bytes of frames held over bytes of the arena when a take first fails, filling up while
  every fourth step frees a frame.
- *steady*: the same in steady state, victims leaving until the frame that came has room. Mean over the
  second half of a history that writes eight arenas full.
- *internal*: bytes taken and not of a frame. *external*: bytes not taken.
- *ratio*: steady, over that of the extents.
- *ns*: of one take and its give, mean over the history.
- *elsewhere*: bytes of frames that lie outside the arena, over bytes held; mean and worst of the history's
  second half. *moved*: bytes that compaction copied, over bytes written.

Lifetimes: `lru` evicts what was used longest ago, and half of the steps use a frame again (recent ones
more); `uniform` evicts at random. Medians over seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from benchmarks.allocators_rivals import Allocator, Buddy, Slabs
from kvstore.frame import HEADER_NBYTES
from kvstore.tiers.compaction import Zones
from kvstore.tiers.extents import PAGE_NBYTES, Extents

MIB: Final = 1 << 20
TURNOVERS: Final = 8  # arenas written in a history
TICK_SHARE: Final = 0.01  # of the arena written between two ticks of compaction, and moved in one at most
SLACKS: Final = (0.0, 0.0625, 0.125, 0.25)
LARGE, MEDIUM, SMALL = 1_474_560, 320 << 10, 64 << 10  # a block of 32 tokens: three layouts
CODECS: Final = (1.0, 0.5, 0.27)  # of a lossless payload: none, int8, 4-bit

Sizes = list[int]


def encoded(*layouts: int) -> Sizes:
    return [HEADER_NBYTES + int(nbytes * share) for nbytes in layouts for share in CODECS]


# What is written in the first and in the last moment of a history; between, the one fades into the other.
MIXES: Final[dict[str, tuple[Sizes, Sizes]]] = {
    "one size": ([HEADER_NBYTES + LARGE],) * 2,
    "one layout, 3 codecs": (encoded(LARGE),) * 2,
    "3 layouts, 3 codecs": (encoded(LARGE, MEDIUM, SMALL),) * 2,
    "drift small to large": (encoded(SMALL), encoded(LARGE)),
    "drift large to small": (encoded(LARGE), encoded(SMALL)),
    "drift none to 4-bit": ([HEADER_NBYTES + LARGE], [HEADER_NBYTES + int(LARGE * 0.27)]),
}
ALLOCATORS: Final[dict[str, Callable[[int], Allocator]]] = {
    "extents": Extents,
    "buddy": lambda n: Buddy(n, tails=False),
    "buddy, tails back": lambda n: Buddy(n, tails=True),
    "slabs of 4 MiB": lambda n: Slabs(n, 1024),
    "slabs of 22 MiB": lambda n: Slabs(n, 16 * 361),  # sixteen of the largest blocks
}


class Held(NamedTuple):
    nbytes: int
    pages: int
    first: int | None  # None: elsewhere


class Frames:
    """What is held, and who leaves next. O(1) a step."""

    def __init__(self, rng: random.Random, lifetimes: str) -> None:
        self._rng = rng
        self._uniform = lifetimes == "uniform"
        self.held: dict[int, Held] = {}  # by name, used longest ago first
        self._names: list[int] = []
        self._at: dict[int, int] = {}
        self._next = 0
        self.nbytes = self.pages = self.elsewhere = 0

    def add(self, frame: Held) -> None:
        name = self._next
        self._next += 1
        self.held[name] = frame
        self._at[name] = len(self._names)
        self._names.append(name)
        self._count(frame, 1)

    def leave(self) -> Held:
        name = self._rng.choice(self._names) if self._uniform else next(iter(self.held))
        last = self._names.pop()
        at = self._at.pop(name)
        if last != name:
            self._names[at] = last
            self._at[last] = at
        frame = self.held.pop(name)
        self._count(frame, -1)
        return frame

    def use(self) -> None:
        """One of them, the ones that came lately more often."""
        if self._names:
            name = self._names[int(len(self._names) * self._rng.random() ** 0.5)]
            self.held[name] = self.held.pop(name)

    def replace(self, name: int, frame: Held) -> None:
        self._count(self.held[name], -1)
        self.held[name] = frame
        self._count(frame, 1)

    def _count(self, frame: Held, sign: int) -> None:
        self.nbytes += sign * frame.nbytes
        if frame.first is None:
            self.elsewhere += sign * frame.nbytes
        else:
            self.pages += sign * frame.pages


class History:
    """Sizes of the frames that come, one mix fading into the other."""

    def __init__(self, mix: str, arena_nbytes: int, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - a seeded history, no secret
        self._first, self._last = MIXES[mix]
        self.total_nbytes = arena_nbytes * TURNOVERS
        self.written_nbytes = 0

    @property
    def over(self) -> bool:
        return self.written_nbytes >= self.total_nbytes

    @property
    def in_second_half(self) -> bool:
        return self.written_nbytes * 2 >= self.total_nbytes

    def size(self) -> int:
        faded = self.written_nbytes / self.total_nbytes
        mix = self._last if self.rng.random() < faded else self._first
        weight = self.rng.random() * sum(1 / n for n in mix)  # as many bytes of every size
        for nbytes in mix:
            weight -= 1 / nbytes
            if weight <= 0:
                break
        self.written_nbytes += nbytes
        return nbytes


def pages_of(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES)


def first_failure(make: Callable[[int], Allocator], mix: str, n_pages: int, seed: int) -> float:
    allocator, history = make(n_pages), History(mix, n_pages * PAGE_NBYTES, seed)
    frames = Frames(history.rng, "uniform")
    while True:
        nbytes = history.size()
        first = allocator.take(pages_of(nbytes))
        if first is None:
            return frames.nbytes / (n_pages * PAGE_NBYTES)
        frames.add(Held(nbytes, pages_of(nbytes), first))
        if history.rng.random() < 0.25:
            gone = frames.leave()
            assert gone.first is not None
            allocator.give(gone.first, gone.pages)


def steady(
    make: Callable[[int], Allocator], mix: str, lifetimes: str, n_pages: int, seed: int
) -> dict[str, float]:
    allocator, history = make(n_pages), History(mix, n_pages * PAGE_NBYTES, seed)
    frames = Frames(history.rng, lifetimes)
    held: list[int] = []
    pages: list[int] = []
    calls: list[tuple[int, int, int]] = []  # what was asked, to be timed without us
    while not history.over:
        nbytes = history.size()
        wanted = pages_of(nbytes)
        while (first := allocator.take(wanted)) is None:
            gone = frames.leave()
            assert gone.first is not None
            allocator.give(gone.first, gone.pages)
            calls += [(0, wanted, 0), (-1, gone.first, gone.pages)]
        calls.append((1, wanted, first))
        frames.add(Held(nbytes, wanted, first))
        if history.rng.random() < 0.5:
            frames.use()
        if history.in_second_half:
            held.append(frames.nbytes)
            pages.append(frames.pages)
    arena = n_pages * PAGE_NBYTES
    taken = statistics.fmean(pages) * PAGE_NBYTES
    return {
        "steady": statistics.fmean(held) / arena,
        "internal": (taken - statistics.fmean(held)) / arena,
        "external": 1 - taken / arena,
        "ns": timed(make(n_pages), calls),
    }


def timed(allocator: Allocator, calls: list[tuple[int, int, int]]) -> float:
    """ns for one take that succeeds with its give, failures included. The same calls give the same pages."""
    takes = 0
    started = time.process_time_ns()
    for kind, one, other in calls:
        if kind < 0:
            allocator.give(one, other)
        else:
            allocator.take(one)
            takes += kind
    return (time.process_time_ns() - started) / takes


def budgeted(
    mix: str, lifetimes: str, n_pages: int, slack: float, compacting: bool, seed: int
) -> dict[str, float]:
    """The arena's own part: extents, a byte budget, and what finds no room lies elsewhere."""
    extents, history = Extents(n_pages), History(mix, n_pages * PAGE_NBYTES, seed)
    zones, frames = Zones(extents), Frames(history.rng, lifetimes)
    budget = int(n_pages * PAGE_NBYTES / (1 + slack))
    arena = Budgeted(extents, zones, frames)
    tick_nbytes = int(budget * TICK_SHARE)
    next_tick = tick_nbytes
    shares: list[float] = []
    while not history.over:
        nbytes = history.size()
        while frames.nbytes + nbytes > budget:
            arena.leave()
        arena.add(nbytes)
        if history.rng.random() < 0.5:
            frames.use()
        if compacting and history.written_nbytes >= next_tick:
            arena.compact(tick_nbytes // PAGE_NBYTES)
            next_tick = history.written_nbytes + tick_nbytes
        if history.in_second_half:
            shares.append(frames.elsewhere / frames.nbytes)
    return {
        "elsewhere": statistics.fmean(shares),
        "worst": max(shares),
        "moved": arena.moved_pages * PAGE_NBYTES / history.written_nbytes,
        "plan_us": arena.planning_ns / max(1, arena.plans) / 1e3,
    }


class Budgeted:
    """What `ArenaTier` does, without bytes."""

    def __init__(self, extents: Extents, zones: Zones, frames: Frames) -> None:
        self._extents = extents
        self._zones = zones
        self._frames = frames
        self._name_at: dict[int, int] = {}  # first page -> the frame's name
        self._elsewhere: dict[int, None] = {}
        self._names = 0
        self.moved_pages = self.plans = self.planning_ns = 0

    def add(self, nbytes: int) -> None:
        pages = pages_of(nbytes)
        first = self._extents.take(pages)
        self._frames.add(Held(nbytes, pages, first))
        self._lies_at(self._names, first, pages)
        self._names += 1

    def leave(self) -> None:
        gone = self._frames.leave()
        if gone.first is not None:
            self._zones.remove(gone.first)
            self._extents.give(gone.first, gone.pages)

    def compact(self, pages_max: int) -> None:
        hopeless = 1 << 62
        for name in list(self._elsewhere):
            frame = self._frames.held.get(name)
            if frame is None:
                del self._elsewhere[name]
            elif frame.pages <= pages_max and frame.pages < hopeless:
                pages_max -= self._bring_in(name, frame, pages_max - frame.pages)
                if self._frames.held[name].first is None:
                    hopeless = frame.pages
                else:
                    del self._elsewhere[name]

    def _bring_in(self, name: int, frame: Held, pages_max: int) -> int:
        """How many pages were moved for it, itself included."""
        moved = 0
        first = self._extents.take(frame.pages)
        if first is None:
            moved = self._make_room(frame.pages, pages_max)
            first = self._extents.take(frame.pages) if moved else None
        if first is None:
            return moved
        self._frames.replace(name, frame._replace(first=first))
        self._lies_at(name, first, frame.pages)
        self.moved_pages += frame.pages
        return moved + frame.pages

    def _make_room(self, pages: int, pages_max: int) -> int:
        started = time.process_time_ns()
        plan = self._zones.plan(pages, lambda first: False, pages_max)
        self.planning_ns += time.process_time_ns() - started
        self.plans += 1
        if plan is None:
            return 0
        for move in plan.moves:
            name = self._name_at[move.first]
            self._zones.remove(move.first)
            self._frames.replace(name, self._frames.held[name]._replace(first=move.to))
            self._lies_at(name, move.to, move.pages)
        for run in [*plan.gaps, *((move.first, move.pages) for move in plan.moves)]:
            self._extents.give(*run)
        self.moved_pages += plan.pages
        return plan.pages

    def _lies_at(self, name: int, first: int | None, pages: int) -> None:
        if first is None:
            self._elsewhere[name] = None
        else:
            self._name_at[first] = name
            self._zones.add(first, pages)


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def rivals(n_pages: int, seeds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for mix in MIXES:
        for lifetimes in ("lru", "uniform"):
            ours = 0.0
            for name, make in ALLOCATORS.items():
                found = medians([steady(make, mix, lifetimes, n_pages, seed) for seed in range(seeds)])
                filled = [first_failure(make, mix, n_pages, seed) for seed in range(seeds)]
                ours = ours or found["steady"]  # the first is the one the arena uses
                figures = {
                    "first_failure": statistics.median(filled),
                    **found,
                    "ratio": found["steady"] / ours,
                }
                rows.append({"mix": mix, "lifetimes": lifetimes, "allocator": name, **figures})
                show(rows)
    return rows


def slacks(n_pages: int, seeds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for mix in MIXES:
        for lifetimes in ("lru", "uniform"):
            for slack in SLACKS:
                for compacting in (False, True):
                    runs = [
                        budgeted(mix, lifetimes, n_pages, slack, compacting, seed) for seed in range(seeds)
                    ]
                    what = {"mix": mix, "lifetimes": lifetimes, "slack": slack, "compacting": compacting}
                    rows.append({**what, **medians(runs)})
                    show(rows)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """The last of them, under the names of its columns if it is the first."""
    if len(rows) == 1:
        print(" | ".join(rows[0]))
    print(row_text(rows[-1]), flush=True)


def row_text(row: dict[str, object]) -> str:
    cells = [
        f"{v:.0f}" if k in ("ns", "plan_us") else f"{v:.3f}" if isinstance(v, float) else str(v)
        for k, v in row.items()
    ]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arena-mib", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.arena_mib < 64:
        parser.error("at least 64 MiB: a slab is 22")
    n_pages = arguments.arena_mib * MIB // PAGE_NBYTES
    found = {"rivals": rivals(n_pages, arguments.seeds), "slacks": slacks(n_pages, arguments.seeds)}
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
