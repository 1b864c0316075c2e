"""S3-FIFO: a small queue that most blocks leave unused, a main queue for those used again. O(1), amortised.

New blocks enter the small queue, a tenth of all; who is used there twice moves to the main one when it comes
up, the others go and are remembered: who comes back from there enters the main queue at once. In the main
queue a block that comes up goes round again as often as it was used since, three times at most. Uses move
nothing.

Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction" (SOSP 2023).
"""

from __future__ import annotations

from typing import Final

from kvstore.core.links import SlotList
from kvstore.core.seams import MakeQueue, Seen
from kvstore.core.uses import Use
from kvstore.policies.ghosts import Ghost, Ghosts

_SMALL, _MAIN = 1, 5
"""Places: the queue, plus uses since it entered, 0 to 3."""
_USES_MAX: Final = 3
_USES_TO_MAIN: Final = 2
_SMALL_SHARE: Final = 10  # a tenth


class S3FIFO:
    """One queue."""

    __slots__ = ("_ghosts", "_main", "_places", "_small", "_uses")

    def __init__(self, seen: Seen) -> None:
        self._small, self._main = SlotList(seen.links), SlotList(seen.links)
        self._places, self._uses = seen.places, seen.uses
        self._ghosts = Ghosts()

    def use(self, use: Use) -> None:
        places, uses = self._places, self._uses
        for slot in use.slots:
            place = places[slot]
            if place:
                places[slot] = min(place + 1, (_SMALL if place < _MAIN else _MAIN) + _USES_MAX)
                continue
            new = uses.counts[slot] or self._ghosts.take(uses.fingerprint(slot)) is None
            places[slot] = _SMALL if new else _MAIN
            (self._small if new else self._main).append(slot)

    def lift(self, slot: int) -> None:
        self._of(slot).remove(slot)

    def put_back(self, slot: int) -> None:
        self._of(slot).prepend(slot)

    def remove(self, slot: int, evicted: bool) -> None:
        self.lift(slot)
        if evicted and self._places[slot] < _MAIN:
            ghost = Ghost(_SMALL, self._uses.counts[slot], self._uses.used_s[slot])
            self._ghosts.add(self._uses.fingerprint(slot), ghost, len(self._main))
        self._places[slot] = 0

    def victim(self, now: float) -> int | None:
        small, main, places = self._small, self._main, self._places
        while len(small) + len(main):
            from_small = _SMALL_SHARE * len(small) > len(small) + len(main) or not len(main)
            slot = (small if from_small else main).first()
            assert slot is not None
            if from_small:
                if places[slot] < _SMALL + _USES_TO_MAIN:
                    return slot
                small.remove(slot)
                places[slot] = _MAIN
            else:
                if places[slot] == _MAIN:
                    return slot
                main.remove(slot)
                places[slot] -= 1
            main.append(slot)
        return None

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _of(self, slot: int) -> SlotList:
        return self._small if self._places[slot] < _MAIN else self._main


def s3fifo(seen: Seen) -> MakeQueue:
    return lambda: S3FIFO(seen)
