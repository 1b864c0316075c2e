"""Least recently used: the slot that was let go longest ago goes first. O(1) for everything.

The core lets go of a chain from its tail to its head, so within one use the leaf of a prefix goes before
its parent: a prefix that is cut in the middle would be dead weight.
"""

from __future__ import annotations

from kvstore.core.links import Links, SlotList


class LRU:
    __slots__ = ("_order",)

    def __init__(self, links: Links) -> None:
        self._order = SlotList(links)

    def insert(self, slot: int) -> None:
        self._order.append(slot)

    def remove(self, slot: int) -> None:
        self._order.remove(slot)

    def victim(self) -> int | None:
        return self._order.first()

    def __len__(self) -> int:
        return len(self._order)
