"""The slots of an engine's paged pool, shared by running sequences and the blocks kept for later ones.

    free    nobody's, content unknown
    in use  by one or more sequences: counted, so that what is read stays what it is until the last lets go
    kept    a full block of the edge shard lies here; in use besides, or idle and evictable

A slot is free when it is neither kept nor in use, whatever order the two end in: safety never rests on a
lease that might have run out. `private + kept + free` is all of them, private meaning in use and not kept.

Two threads meet here, the engine's (it takes and gives back) and the event loop (it lends, keeps and drops),
so every step is taken under one lock: about 1 us.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from kvstore.core.slots import SlotTable

__all__ = ["PoolCounts", "PoolSlots"]

KEPT: Final = "kept"
"""The owner, in the table of slots, of a block that came from elsewhere and was never a sequence's."""


class PoolCounts(NamedTuple):
    free: int
    private: int  # in use by a sequence, and nothing else
    kept: int


class PoolSlots:
    """`n_slots` slots. Misuse (letting go of what is not held) is a KeyError or an assertion: our own bug."""

    def __init__(self, n_slots: int) -> None:
        self._table = SlotTable(n_slots)
        self._users = [0] * n_slots
        self._kept = bytearray(n_slots)
        self._n_kept = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._table)

    @property
    def n_free(self) -> int:
        return self._table.n_free

    def counts(self) -> PoolCounts:
        with self._lock:
            held = len(self._table) - self._table.n_free
            return PoolCounts(self._table.n_free, held - self._n_kept, self._n_kept)

    def can_allocate(self, n: int) -> bool:
        with self._lock:
            return self._table.can_allocate(n)

    def is_shared(self, slot: int, leaving: int = 0) -> bool:
        """Does somebody beside its one user read it, or may come to? So many of its users do not count."""
        with self._lock:
            return self._users[slot] - leaving > 1 or bool(self._kept[slot])

    def is_kept(self, slot: int) -> bool:
        with self._lock:
            return bool(self._kept[slot])

    def users(self, slot: int) -> int:
        """When the last one gives it back it is free, or idle if it is kept."""
        with self._lock:
            return self._users[slot]

    def free_run(self, n: int, claimed: Iterable[range], after: int | None = None) -> int | None:
        """`SlotTable.free_run`: where a sequence could grow undisturbed. Nothing is taken."""
        with self._lock:
            return self._table.free_run(n, claimed, after)

    def allocate(self, n: int, owner: str, after: int | None = None) -> list[int]:
        """`n` slots for one user, `SlotTable.allocate`'s choice. Raises OverLimit, and takes nothing."""
        with self._lock:
            slots = self._table.allocate(n, owner, after)
            for slot in slots:
                self._users[slot] = 1
            return slots

    def take_kept(self, n: int) -> list[int]:
        """Up to `n` slots for blocks from elsewhere: kept, used by nobody."""
        with self._lock:
            slots = self._table.allocate(min(n, self._table.n_free), KEPT)
            for slot in slots:
                self._mark_kept(slot)
            return slots

    def lend(self, slots: Sequence[int]) -> None:
        """One more user of each. They must be kept or in use: a free slot's content is nobody's."""
        with self._lock:
            for slot in slots:
                assert self._kept[slot] or self._users[slot], f"slot {slot} is free: nothing to lend"
                self._users[slot] += 1

    def give_back(self, slots: Sequence[int]) -> None:
        """One user less of each; who was the last one of a slot that is not kept frees it."""
        with self._lock:
            for slot in slots:
                assert self._users[slot], f"slot {slot} is in use by nobody: given back twice"
                self._users[slot] -= 1
                self._free_if_unused(slot)

    def keep(self, slot: int) -> None:
        """A full block lies there, and stays when its users go. It must be in use, and not kept yet."""
        with self._lock:
            assert self._users[slot], f"slot {slot} is in use by nobody: its content is unknown"
            assert not self._kept[slot], f"slot {slot} holds another block already"
            self._mark_kept(slot)

    def drop(self, slot: int) -> None:
        """Keep it no longer: free now, or when its last user goes."""
        with self._lock:
            assert self._kept[slot], f"slot {slot} is not kept: dropped twice"
            self._kept[slot] = 0
            self._n_kept -= 1
            self._free_if_unused(slot)

    def check_integrity(self, users: Mapping[int, int], kept: Collection[int]) -> None:
        """Conservation, against what the owners themselves say. Raises AssertionError."""
        with self._lock:
            self._table.check_integrity()
            counted = Counter({slot: n for slot, n in enumerate(self._users) if n})
            assert counted == Counter(users), "a slot is used by somebody unknown, or a use was forgotten"
            marked = {slot for slot, flag in enumerate(self._kept) if flag}
            assert marked == set(kept), "a slot is kept without a block, or a block without its slot"
            assert len(marked) == self._n_kept, "kept slots are miscounted"
            held = {slot for slot in range(len(self._table)) if self._table.owner(slot) is not None}
            assert held == marked | counted.keys(), "a slot is neither free, nor kept, nor in use"

    def _mark_kept(self, slot: int) -> None:
        self._kept[slot] = 1
        self._n_kept += 1

    def _free_if_unused(self, slot: int) -> None:
        if not self._users[slot] and not self._kept[slot]:
            self._table.free((slot,))
