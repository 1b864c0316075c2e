"""Where each slot's frame is: on its way to a disk, or in a row of a segment.

Two columns by slot, grown as slots are named, and an entry for each frame that is not written yet. A slot's
entry is believed only if the row says the same, so forgetting rows is enough to forget what points to them.
"""

from __future__ import annotations

from array import array

from kvstore.tiers.base import Place
from kvstore.tiers.nvme.appender import Pending
from kvstore.tiers.nvme.layout import record_nbytes
from kvstore.tiers.nvme.segment import DEAD, Segment


class Index:
    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}  # by number
        self.nbytes = 0  # of the frames held
        self.disk_nbytes = 0  # the same with prefixes and padding
        self._pending: dict[int, Pending] = {}  # by slot
        self._rows = array("q")  # by slot: segment number << 32 | row; DEAD: none
        self._generations = array("Q")

    def queued(self, place: Place) -> Pending | None:
        pending = self._pending.get(place.slot)
        return pending if pending is not None and pending.generation == place.generation else None

    def find(self, place: Place) -> tuple[Segment, int] | None:
        """The row that holds the place's frame."""
        if not 0 <= place.slot < len(self._rows) or self._rows[place.slot] == DEAD:
            return None
        if self._generations[place.slot] != place.generation:
            return None
        number, row = self._rows[place.slot] >> 32, self._rows[place.slot] & 0xFFFF_FFFF
        segment = self.segments.get(number)
        if segment is None or (segment.slots[row], segment.generations[row]) != place:
            return None
        return segment, row

    def holds(self, place: Place) -> bool:
        return self.queued(place) is not None or self.find(place) is not None

    def generation(self, slot: int) -> int:
        """Of the frame the slot holds; -1 for none."""
        if (pending := self._pending.get(slot)) is not None:
            return pending.generation
        if not 0 <= slot < len(self._rows):
            return -1
        generation = self._generations[slot]
        return -1 if self.find(Place(slot, generation)) is None else generation

    def adopt(self, segment: Segment, row: int, place: Place) -> None:
        self._hold(segment, row, place)
        self._count(segment.sizes[row], 1)

    def queue(self, pending: Pending) -> None:
        self._pending[pending.slot] = pending
        self._count(pending.nbytes, 1)

    def land(self, pending: Pending, segment: Segment) -> None:
        """A queued frame is on the disk."""
        del self._pending[pending.slot]
        self._hold(segment, pending.row, Place(pending.slot, pending.generation))

    def move(self, copy: Pending) -> None:
        """A copy takes the place of what it is a copy of, unless that was discarded meanwhile."""
        assert copy.source is not None
        assert copy.segment is not None
        segment, row = copy.source
        place = Place(copy.slot, copy.generation)
        if self.find(place) == (segment, row):
            segment.kill(row)
            self._hold(copy.segment, copy.row, place)

    def discard(self, place: Place) -> Segment | None:
        """Forget the place's frame; the segment it was in, if any."""
        pending = self.queued(place)
        if pending is not None:
            pending.alive = False
            del self._pending[place.slot]
            self._count(pending.nbytes, -1)
            return None
        found = self.find(place)
        if found is None:
            return None
        segment, row = found
        segment.kill(row)
        self._rows[place.slot] = DEAD
        self._count(segment.sizes[row], -1)
        return segment

    def _hold(self, segment: Segment, row: int, place: Place) -> None:
        missing = place.slot + 1 - len(self._rows)
        if missing > 0:
            missing = max(missing, len(self._rows) // 2)
            self._rows.extend(array("q", [DEAD]) * missing)
            self._generations.extend(array("Q", [0]) * missing)
        segment.give(row, place.slot, place.generation)
        self._rows[place.slot] = segment.number << 32 | row
        self._generations[place.slot] = place.generation

    def _count(self, nbytes: int, sign: int) -> None:
        self.nbytes += sign * nbytes
        self.disk_nbytes += sign * record_nbytes(nbytes)
