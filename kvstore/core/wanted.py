"""Slots that wait for a move between tiers: names, no bytes, bounded by the bytes they stand for. O(1)."""

from __future__ import annotations


class Wanted:
    """Slots that wait for their move, each once, the first first; bounded in bytes."""

    def __init__(self, nbytes_max: int) -> None:
        self._slots: dict[int, tuple[int, int]] = {}  # slot -> generation, bytes
        self._nbytes = 0
        self._nbytes_max = nbytes_max

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, slot: object) -> bool:
        return slot in self._slots

    def add(self, slot: int, generation: int, nbytes: int) -> bool:
        """False when there is no room in the queue."""
        if (waiting := self._slots.get(slot)) is not None:
            if waiting[0] == generation:
                return True  # it keeps its place, however often it is named
            self._forget(slot)
        if self._nbytes + nbytes > self._nbytes_max:
            return False
        self._slots[slot] = generation, nbytes
        self._nbytes += nbytes
        return True

    def take(self) -> tuple[int, int] | None:
        """The first slot and its generation when it was added; None when nobody waits."""
        slot = next(iter(self._slots), None)
        return None if slot is None else (slot, self._forget(slot))

    def _forget(self, slot: int) -> int:
        generation, nbytes = self._slots.pop(slot)
        self._nbytes -= nbytes
        return generation
