"""Baselines for comparison only: FIFO, LFU and GDSF, as cache studies define them. No shard offers them.

LFU counts uses since the block came in and among equals takes the least recently used. GDSF (Cherkasova
1998) ranks by L + uses / size, where L is the rank of the last block that went; blocks are of one size, so it
is LFU with aging. Both keep a heap: O(log n) a use.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

from kvstore.core.seams import MakePolicy, MakeQueue, Seen
from kvstore.core.uses import Use
from kvstore.policies.lru import LRU

_QUEUED: Final = 1


class FIFO(LRU):
    """In the order in which blocks came in; uses move nothing."""

    __slots__ = ()

    def use(self, use: Use) -> None:
        for slot in reversed(use.slots):
            if not self._places[slot]:
                self._places[slot] = _QUEUED
                self._order.append(slot)


class Ranked:
    """The lowest rank goes first, among equals the one used longest ago."""

    def __init__(self, seen: Seen, ages: bool) -> None:
        self._places = seen.places
        self._ages = ages
        self._counts: dict[int, int] = {}
        self._ranks: dict[int, tuple[int, int]] = {}  # (rank, order of the last use)
        self._heap: list[tuple[tuple[int, int], int]] = []  # stale where `_ranks` says otherwise
        self._lifted: dict[int, tuple[int, int]] = {}
        self._age = self._uses = 0

    def use(self, use: Use) -> None:
        for slot in reversed(use.slots):
            self._places[slot] = _QUEUED
            self._uses += 1
            self._counts[slot] = self._counts.get(slot, 0) + 1
            self._push(slot, (self._age + self._counts[slot], self._uses))

    def lift(self, slot: int) -> None:
        self._lifted[slot] = self._ranks.pop(slot)

    def put_back(self, slot: int) -> None:
        self._push(slot, self._lifted.pop(slot))

    def remove(self, slot: int, evicted: bool) -> None:
        rank, _ = self._ranks.pop(slot)
        del self._counts[slot]
        self._places[slot] = 0
        if self._ages and evicted:
            self._age = rank

    def victim(self, now: float) -> int | None:
        while self._heap:
            rank, slot = self._heap[0]
            if self._ranks.get(slot) == rank:
                return slot
            heapq.heappop(self._heap)
        return None

    def __len__(self) -> int:
        return len(self._ranks)

    def _push(self, slot: int, rank: tuple[int, int]) -> None:
        self._ranks[slot] = rank
        heapq.heappush(self._heap, (rank, slot))


def fifo(seen: Seen) -> MakeQueue:
    return lambda: FIFO(seen)


def _ranked(ages: bool) -> Callable[[Seen], MakeQueue]:
    return lambda seen: lambda: Ranked(seen, ages)


BASELINES: Final[dict[str, MakePolicy]] = {"fifo": fifo, "lfu": _ranked(False), "gdsf": _ranked(True)}
