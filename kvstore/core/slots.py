"""Slots: who holds which piece of a pool, and how often each was reused.

Of an engine's paged pool: slots of one size, where adjacent slots can be read as one view. (A shard's own
versions are columns, see versions.py: it has no runs to find.) What is taken stands in one byte a slot, so
that a free run is found by a substring search: about 1 us where a run is near the lowest free slot, 5 us a
100,000 slots where it is not. Every free bumps the slot's generation, so that a reference taken before it can
be told from one taken after. Failure is explicit: OverLimit, and nothing was taken.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.errors import OverLimit

_FREE, _HELD = 0, 1


class SlotTable:
    """`n_slots` slots, each free or held by one owner. Conservation: free + held == n_slots.

    Worked example (`.` free, letters are owners), the table of tests/kvstore/core/test_slots.py:

        start                          ........
        allocate(3, "a") -> 0 1 2      aaa.....   the first run
        allocate(2, "b") -> 3 4        aaabb...
        free([0, 1, 2])                ...bb...   generations of 0, 1 and 2 grow by one
        allocate(2, "c") -> 0 1        cc.bb...   the first run again, from the lowest free slot
        allocate(1, "b", after=4) -> 5 cc.bbb..   right after the slot it named
        allocate(3, "d") -> 6 7 2      ccdbbbdd   no run of three: the longest pieces first
    """

    __slots__ = ("_generations", "_lowest", "_owners", "_taken")

    def __init__(self, n_slots: int) -> None:
        if n_slots < 1:
            raise ValueError("a slot table needs at least one slot")
        self._taken = bytearray(n_slots)
        self._generations = [1] * n_slots  # 0 is no generation: a zeroed reference is never current
        self._owners: dict[int, str] = {}
        self._lowest = 0  # no slot below this one is free

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def n_free(self) -> int:
        return len(self._taken) - len(self._owners)

    def generation(self, slot: int) -> int:
        return self._generations[slot]

    def owner(self, slot: int) -> str | None:
        """Who holds the slot; None when it is free."""
        return self._owners.get(slot)

    def is_current(self, slot: int, generation: int) -> bool:
        """Is a reference of this generation still to what it was taken of?"""
        return slot in self._owners and self._generations[slot] == generation

    def can_allocate(self, n: int) -> bool:
        return n <= self.n_free

    def allocate(self, n: int, owner: str, after: int | None = None) -> list[int]:
        """Take `n` slots: right after slot `after` if free, else the first free run, else the longest pieces.

        Raises OverLimit, and takes nothing, when fewer are free.
        """
        if n < 0:
            raise ValueError(f"{n} slots asked for: ask for none or more")
        if not self.can_allocate(n):
            raise OverLimit(f"{n} slots asked for, {self.n_free} of {len(self)} are free: release some")
        if n and after is not None and self._taken[after + 1 : after + 1 + n] == bytes(n):
            return self._take(after + 1, n, owner)
        slots: list[int] = []
        run = n
        while len(slots) < n:
            run = min(run, n - len(slots))
            start = self._taken.find(bytes(run), self._lowest)
            if start < 0:
                run -= 1  # a run of one is always found: enough slots are free
            else:
                slots += self._take(start, run, owner)
        return slots

    def free_run(self, n: int, claimed: Iterable[range], after: int | None = None) -> int | None:
        """Where `n` adjacent slots are free and claimed by nobody: right after slot `after`, else the first
        such run, else None. Takes nothing. O(slots)."""
        taken = bytearray(self._taken)
        for claim in claimed:
            taken[claim.start : claim.stop] = bytes([_HELD]) * len(claim)
        if after is not None and taken[after + 1 : after + 1 + n] == bytes(n):
            return after + 1
        start = taken.find(bytes(n))
        return None if start < 0 else start

    def free(self, slots: Iterable[int]) -> None:
        """Give slots back. Raises KeyError for one that is not held: a double free is our own bug."""
        for slot in slots:
            del self._owners[slot]
            self._taken[slot] = _FREE
            self._generations[slot] += 1
            self._lowest = min(self._lowest, slot)

    def check_integrity(self) -> None:
        """Independent walk: every slot is free or held, once."""
        assert all(self._taken[slot] == _HELD for slot in self._owners), "an owned slot is free"
        assert self._taken.count(_HELD) == len(self._owners), "a slot is held without an owner"
        assert self._taken.count(_FREE) == self.n_free, "a slot is neither free nor held"
        assert self._taken.find(bytes(1), 0, self._lowest) < 0, "a free slot was lost"

    def _take(self, start: int, n: int, owner: str) -> list[int]:
        slots = list(range(start, start + n))
        self._taken[start : start + n] = bytes([_HELD]) * n
        for slot in slots:
            self._owners[slot] = owner
        if start == self._lowest:
            self._lowest = start + n
        return slots
