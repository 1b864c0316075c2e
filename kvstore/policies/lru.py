"""Least recently used: the slot that was unpinned longest ago goes first. O(1) for everything.

The core unpins a chain from its tail to its head, so within one use the leaf of a prefix goes before
its parent: a prefix that is cut in the middle would be dead weight.
"""

from __future__ import annotations

from collections import OrderedDict


class LRU:
    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def insert(self, slot: int) -> None:
        self._order[slot] = None

    def remove(self, slot: int) -> None:
        del self._order[slot]

    def victim(self) -> int | None:
        return next(iter(self._order), None)

    def __len__(self) -> int:
        return len(self._order)
