"""What the tier below can hold moves with what it holds: small frames waste a part of their last block.

Who drives the shard tells it what the tier says. When that is less than what lies there, idle versions go in
the policy's order, so many a call, and until enough went nothing is sent below. What is pinned stays until
it is let go of. Cost: a victim for each version that goes (eviction.py). Failure is an answer: none went.
"""

from __future__ import annotations

from kvstore.core.index import Index
from kvstore.core.retiring import Retiring


class RoomBelow:
    def __init__(self, index: Index, retiring: Retiring) -> None:
        self._index = index
        self._retiring = retiring

    def resize(self, capacity_nbytes: int, versions_max: int) -> int:
        """The tier can hold so many bytes from now on. How many versions went for that: fewer than
        `versions_max` when no more have to, or can."""
        nvme = self._index.nvme
        nvme.capacity_nbytes = max(1, capacity_nbytes)  # there is a tier, whatever room it has
        went = 0
        while nvme.is_over and went < versions_max and self._give_up_one():
            went += 1
        nvme.ceiling_nbytes = nvme.used_nbytes
        return went

    def give_up(self, nbytes: int, versions_max: int) -> int:
        """The tier is full before it holds what it said: make some room. How many bytes went, about so many,
        of at most so many versions."""
        nvme = self._index.nvme
        before = nvme.used_nbytes
        for _ in range(versions_max):
            if before - nvme.used_nbytes >= nbytes or not self._give_up_one():
                break
        return before - nvme.used_nbytes

    def _give_up_one(self) -> bool:
        nvme = self._index.nvme
        victim = nvme.evictables.victim(None, self._index.now)
        if victim is not None:
            self._retiring.evict_from(nvme, victim)
        return victim is not None
