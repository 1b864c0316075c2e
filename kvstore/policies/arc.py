"""ARC: recency and frequency share the room, by which of the two misses more. O(1) for everything.

Blocks used once stand in one list, those used more often in another, each in order of last use; whom each of
them gave up is remembered in a list of its own. A block that comes back from the first of these says that
recency deserves more room, one from the second that frequency does. The room of all is what the queue holds.

Remembers as many blocks as it holds, in dictionaries: about 110 bytes each.

Megiddo, Modha: "ARC: a self-tuning, low overhead replacement cache" (FAST 2003).
"""

from __future__ import annotations

from kvstore.core.links import SlotList
from kvstore.core.seams import MakeQueue, Seen
from kvstore.core.uses import Use

_ONCE, _OFTEN = 1, 2


class ARC:
    """One queue."""

    __slots__ = ("_gone_often", "_gone_once", "_often", "_once", "_places", "_room_for_once", "_uses")

    def __init__(self, seen: Seen) -> None:
        self._once, self._often = SlotList(seen.links), SlotList(seen.links)
        self._gone_once: dict[int, None] = {}  # fingerprints, the oldest first
        self._gone_often: dict[int, None] = {}
        self._room_for_once = 0.0
        self._places, self._uses = seen.places, seen.uses

    def use(self, use: Use) -> None:
        places = self._places
        for slot in use.slots:
            if places[slot]:
                self._of(slot).remove(slot)
                places[slot] = _OFTEN
            else:
                places[slot] = _OFTEN if self._came_back(self._uses.fingerprint(slot)) else _ONCE
            self._of(slot).append(slot)

    def lift(self, slot: int) -> None:
        self._of(slot).remove(slot)

    def put_back(self, slot: int) -> None:
        self._of(slot).prepend(slot)

    def remove(self, slot: int, evicted: bool) -> None:
        room = len(self)
        self._of(slot).remove(slot)
        if evicted:
            gone = self._gone_once if self._places[slot] == _ONCE else self._gone_often
            gone[self._uses.fingerprint(slot)] = None
            while len(self._gone_once) > max(0, room - len(self._once)):
                del self._gone_once[next(iter(self._gone_once))]
            while len(self._gone_often) > max(0, room - len(self._gone_once)):
                del self._gone_often[next(iter(self._gone_often))]
        self._places[slot] = 0

    def victim(self, now: float) -> int | None:
        recent, frequent = self._once.first(), self._often.first()
        if recent is None or (frequent is not None and len(self._once) <= self._room_for_once):
            return frequent
        return recent

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def _of(self, slot: int) -> SlotList:
        return self._once if self._places[slot] == _ONCE else self._often

    def _came_back(self, fingerprint: int) -> bool:
        once, often = self._gone_once, self._gone_often
        if fingerprint in once:
            step = max(1.0, len(often) / len(once))
            self._room_for_once = min(float(len(self)), self._room_for_once + step)
            del once[fingerprint]
        elif fingerprint in often:
            self._room_for_once = max(0.0, self._room_for_once - max(1.0, len(once) / len(often)))
            del often[fingerprint]
        else:
            return False
        return True


def arc(seen: Seen) -> MakeQueue:
    return lambda: ARC(seen)
