"""Least recently used: the slot that was let go longest ago goes first. O(1) for everything.

The core lets go of a chain from its tail to its head, so within one use the leaf of a prefix goes before
its parent: a prefix that is cut in the middle would be dead weight.
"""

from __future__ import annotations

from kvstore.core.links import SlotList
from kvstore.core.seams import MakeQueue, Seen
from kvstore.core.uses import Use

_QUEUED = 1


class LRU:
    """One queue."""

    __slots__ = ("_order", "_places")

    def __init__(self, seen: Seen) -> None:
        self._order = SlotList(seen.links)
        self._places = seen.places

    def use(self, use: Use) -> None:
        order, places = self._order, self._places
        for slot in use.slots:
            if places[slot]:
                order.remove(slot)
            else:
                places[slot] = _QUEUED
            order.append(slot)

    def lift(self, slot: int) -> None:
        self._order.remove(slot)

    def put_back(self, slot: int) -> None:
        self._order.prepend(slot)

    def remove(self, slot: int, evicted: bool) -> None:
        self._order.remove(slot)
        self._places[slot] = 0

    def victim(self, now: float) -> int | None:
        return self._order.first()

    def __len__(self) -> int:
        return len(self._order)


def lru(seen: Seen) -> MakeQueue:
    return lambda: LRU(seen)
