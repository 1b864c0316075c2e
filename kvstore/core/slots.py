"""Slots: who holds which piece of a pool, and how often each was reused.

One table serves a shard's storage (slots are ids, bytes are budgeted by the core) and an engine's paged
pool (slots of one size, where adjacent slots can be read as one view). Allocating n slots costs O(n) when
a run is free at the hint, O(free) otherwise. Every free bumps the slot's generation, so that a reference
taken before it can be told from one taken after.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from kvstore.errors import OverLimit


class SlotTable:
    """`n_slots` slots, each free or held by one owner. Conservation: free + held == n_slots."""

    __slots__ = ("_free", "_generations", "_owners")

    def __init__(self, n_slots: int) -> None:
        if n_slots < 1:
            raise ValueError("a slot table needs at least one slot")
        self._free = list(range(n_slots))  # ascending, so that runs show
        self._generations = [0] * n_slots
        self._owners: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._generations)

    @property
    def n_free(self) -> int:
        return len(self._free)

    def generation(self, slot: int) -> int:
        return self._generations[slot]

    def owner(self, slot: int) -> str | None:
        """Who holds the slot; None when it is free."""
        return self._owners.get(slot)

    def owned_by(self, owner: str) -> list[int]:
        return sorted(slot for slot, held_by in self._owners.items() if held_by == owner)

    def is_current(self, slot: int, generation: int) -> bool:
        """Is a reference of this generation still to what it was taken of?"""
        return slot in self._owners and self._generations[slot] == generation

    def can_allocate(self, n: int) -> bool:
        return n <= len(self._free)

    def allocate(self, n: int, owner: str, after: int | None = None) -> list[int]:
        """Take `n` slots: right after slot `after` if free, else the first free run, else the lowest.

        Raises OverLimit, and takes nothing, when fewer are free.
        """
        if not self.can_allocate(n):
            raise OverLimit(f"{n} slots asked for, {len(self._free)} of {len(self)} are free: release some")
        if n == 0:
            return []
        start = self._run_start(n, after)
        taken = self._free[start : start + n]
        del self._free[start : start + n]
        for slot in taken:
            self._owners[slot] = owner
        return taken

    def free(self, slots: Iterable[int]) -> None:
        """Give slots back. Raises KeyError for one that is not held: a double free is our own bug."""
        for slot in slots:
            del self._owners[slot]
            self._generations[slot] += 1
            bisect.insort(self._free, slot)

    def check_integrity(self) -> None:
        """Independent walk: every slot is free or held, once."""
        held = set(self._owners)
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert held.isdisjoint(self._free), "a slot is both free and held"
        assert held | set(self._free) == set(range(len(self))), "a slot is neither free nor held"

    def _run_start(self, n: int, after: int | None) -> int:
        """Index into the free list where the taking starts."""
        if after is not None:
            at = bisect.bisect_left(self._free, after + 1)
            if at + n <= len(self._free) and self._free[at + n - 1] == after + n:
                return at
        for at in range(len(self._free) - n + 1):
            if self._free[at + n - 1] - self._free[at] == n - 1:
                return at
        return 0
