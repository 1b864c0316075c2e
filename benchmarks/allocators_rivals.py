"""Allocators that the arena does not use, to be measured beside the one it does.

Each answers `take(pages)` with a first page or None and takes it back with `give`; none touches memory.
"""

from __future__ import annotations

from typing import Protocol


class Allocator(Protocol):
    def take(self, pages: int) -> int | None: ...

    def give(self, first: int, pages: int) -> None: ...


class Buddy:
    """Binary buddies (Knowlton 1965): runs of 2^k pages at multiples of 2^k, joined as soon as both are free.

    With `tails` what a block does not need of its run is given back at once, in smaller runs, as the kernel's
    alloc_pages_exact does: less lost inside blocks, more runs to join.
    """

    def __init__(self, n_pages: int, tails: bool) -> None:
        self._tails = tails
        self._n_pages = n_pages
        self._free: list[dict[int, None]] = [{} for _ in range(n_pages.bit_length() + 1)]
        self._spread(0, n_pages)

    def take(self, pages: int) -> int | None:
        order = (pages - 1).bit_length()
        for found in range(order, len(self._free)):
            if self._free[found]:
                break
        else:
            return None
        first = self._free[found].popitem()[0]
        while found > order:
            found -= 1
            self._free[found][first + (1 << found)] = None
        if self._tails:
            self._spread(first + pages, first + (1 << order))
        return first

    def give(self, first: int, pages: int) -> None:
        self._spread(first, first + (pages if self._tails else 1 << (pages - 1).bit_length()))

    def _spread(self, first: int, end: int) -> None:
        """Free [first, end) as the largest aligned runs it is made of."""
        while first < end:
            order = min((end - first).bit_length() - 1, (first & -first).bit_length() - 1 if first else 64)
            self._join(first, order)
            first += 1 << order

    def _join(self, first: int, order: int) -> None:
        while order + 1 < len(self._free) and (buddy := first ^ (1 << order)) in self._free[order]:
            del self._free[order][buddy]
            first = min(first, buddy)
            order += 1
        self._free[order][first] = None


class Slabs:
    """Slabs of one size, each cut into blocks of one class (Bonwick 1994; memcached).

    A class is a block size of exactly so many pages, which is the best that classes can do. A slab whose
    blocks are all free goes back to all classes: the rebalancing that needs no block to move.
    """

    def __init__(self, n_pages: int, slab_pages: int) -> None:
        self._slab_pages = slab_pages
        self._slabs = list(range(n_pages // slab_pages))  # of no class
        self._partial: dict[int, dict[int, None]] = {}  # class -> slabs that have a free block
        self._blocks: dict[int, list[int]] = {}  # slab -> first pages of its free blocks

    def take(self, pages: int) -> int | None:
        partial = self._partial.setdefault(pages, {})
        if partial:
            slab = next(reversed(partial))
        elif self._slabs:
            slab = self._slabs.pop()
            first = slab * self._slab_pages
            self._blocks[slab] = list(range(first, first + self._slab_pages - pages + 1, pages))
            partial[slab] = None
        else:
            return None
        block = self._blocks[slab].pop()
        if not self._blocks[slab]:
            del partial[slab]
        return block

    def give(self, first: int, pages: int) -> None:
        slab = first // self._slab_pages
        self._blocks[slab].append(first)
        partial = self._partial[pages]
        partial[slab] = None
        if len(self._blocks[slab]) == self._slab_pages // pages:
            del partial[slab], self._blocks[slab]
            self._slabs.append(slab)
