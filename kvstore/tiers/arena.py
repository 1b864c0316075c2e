"""Host memory in one arena that processes of this host may map: a slot table, then page-aligned frames.

The arena is a sealed memfd (sealed.py), so that what a shard verified stays what it verified. Where that is
not to be had `share` answers None.

Ownership of an extent:

    allocate -> arriving -> write -> stored under a place -> discard -> free
                   |                   |                      \\-- borrowed: free when the last borrower
                   |                   |                           gives it back
                   |                   +-- moved: stored elsewhere, this one as after a discard
                   +-- give_up -> free

A frame that finds no extent lies in a buffer of its own, which readers get through the shard, until `compact`
brings it in. The arena is an eighth larger than the core's budget: measured in docs/benchmarks.md, why in
docs/design.md 11.8. Costs no copy on write and one on read. Memory the arena has touched it keeps.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from kvstore import failpoints
from kvstore.nouns import Tier
from kvstore.tiers import slot_table
from kvstore.tiers.base import Place
from kvstore.tiers.compaction import Move, Zones
from kvstore.tiers.copying import beside_the_loop, corrupted, fill, join, to_its_end
from kvstore.tiers.extents import PAGE_NBYTES, Extents
from kvstore.tiers.sealed import Descriptor, sealed_memory
from kvstore.tiers.slot_table import GENERATION

SLOTS_MAX: Final = 1 << 20  # of the table: 32 MiB at most, touched as slots are used
SLACK: Final = 0.125  # of the budget, against fragmentation and page ends
ARRIVING: Final = -1  # the slot of an extent whose frame is not stored yet
LOOKS_MAX: Final = 1024  # at frames that lie elsewhere, in one call of `compact`


class Geometry(NamedTuple):
    """What a process needs beside the arena's file to read it."""

    nbytes: int
    slots: int


class Stored(NamedTuple):
    generation: int
    frame: memoryview
    offset: int  # 0: not in the arena


@dataclass(slots=True)
class Extent:
    pages: int
    slot: int = ARRIVING
    borrowers: int = 0
    dropped: bool = False  # nobody's any more but its borrowers'


class ArenaTier:
    tier = Tier.HOST

    def __init__(self, capacity_nbytes: int, slots: int = SLOTS_MAX) -> None:
        """Memory for `capacity_nbytes` of frames, reserved but not touched."""
        table = _pages(slots * slot_table.ROW_NBYTES)
        pages = table + _pages(int(capacity_nbytes * (1 + SLACK))) + 1
        self.geometry = Geometry(pages * PAGE_NBYTES, slots)
        self.counters: Counter[str] = Counter()
        self._file: Descriptor | None
        self._file, self._map = sealed_memory(self.geometry.nbytes)
        self._arena = memoryview(self._map)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._rows = slot_table.rows_of(self._arena, slots)
        self._data_offset = table * PAGE_NBYTES
        self._free = Extents(pages - table)
        self._zones = Zones(self._free)
        self._extents: dict[int, Extent] = {}  # by offset: all that is not free
        self._frames: dict[int, Stored] = {}  # by slot
        self._elsewhere: dict[int, None] = {}  # slots whose frames are not in the arena
        self._vacating: set[int] = set()  # offsets of extents that `compact` moves out of a window
        self._withheld: list[tuple[int, int]] = []  # free runs of that window
        self._nbytes = 0

    def share(self) -> int | None:
        """A descriptor of the arena that can only read, for another process; the caller closes it.

        None where this arena cannot be shared safely.
        """
        if self._file is None:
            return None
        return os.open(f"/proc/self/fd/{self._file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)

    # -- writing -----------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> memoryview:
        room = self._extent(nbytes)
        return np.empty(nbytes, dtype=np.uint8).data if room is None else room

    def give_up(self, frame: memoryview) -> None:
        offset = self._offset_of(frame)
        if offset:
            self._drop(offset)

    async def write(self, place: Place, frame: memoryview) -> None:
        taken = False
        try:
            if await failpoints.hit("storage.write") is failpoints.Effect.DROP:
                return
            if not self._offset_of(frame):
                frame = await self._moved_in(frame)
            kept = self._frames.get(place.slot)  # no await from here to `_store`: the slot may change hands
            if kept is not None and kept.generation >= place.generation:
                return  # late: these bytes are here, or the slot was given to somebody else meanwhile
            self.discard_slot(place.slot)
            self._store(place, frame)
            taken = True
        finally:
            if not taken:
                self.give_up(frame)

    # -- reading -----------------------------------------------------------------------------------

    async def read(self, place: Place) -> memoryview | None:
        frame = await self.borrow(place)
        if frame is None:
            return None
        try:
            return await beside_the_loop(frame.nbytes, lambda: join(frame))
        finally:
            self.give_back(frame)

    async def borrow(self, place: Place) -> memoryview | None:
        stored = self._find(place)
        if stored is None:
            return None
        if stored.offset:
            self._extents[stored.offset].borrowers += 1
        try:
            effect = await failpoints.hit("storage.read")
        except BaseException:
            self.give_back(stored.frame)
            raise
        if effect is None:
            return stored.frame
        self.give_back(stored.frame)
        return None if effect is failpoints.Effect.DROP else corrupted(stored.frame)

    def give_back(self, frame: memoryview) -> None:
        extent = self._extents.get(offset := self._offset_of(frame))
        if extent is not None:
            extent.borrowers -= 1
            if extent.dropped and not extent.borrowers:
                self._free_extent(offset)

    # -- the rest of the seam ----------------------------------------------------------------------

    def discard(self, place: Place) -> None:
        if self._find(place) is not None:
            self.discard_slot(place.slot)
        elif place.slot < self.geometry.slots and self._rows[place.slot, GENERATION] == place.generation:
            slot_table.withdraw(self._rows, place.slot)  # it had left, and lives nowhere now

    def leave(self, place: Place) -> None:
        self._tell(place, 0, 0)
        if self._find(place) is not None:
            self._forget(place.slot)

    def discard_slot(self, slot: int) -> None:
        """Forget whatever the slot holds. Readers are told before the bytes can change."""
        if slot in self._frames:
            if slot < self.geometry.slots:
                slot_table.withdraw(self._rows, slot)
            self._forget(slot)

    async def compact(self, nbytes_max: int) -> int:
        """Bring frames in that lie elsewhere, and move others together where that makes room for them.

        Copies at most `nbytes_max`, one frame at a time; how many it was. What is borrowed stays where it is.
        Not to be called again before it has returned.
        """
        copied = 0
        hopeless = self._free.n_pages + 1  # from so many pages on no room was found
        for _ in range(min(LOOKS_MAX, len(self._elsewhere))):
            slot = next(iter(self._elsewhere), None)
            if slot is None:  # discarded meanwhile
                break
            self._elsewhere[slot] = self._elsewhere.pop(slot)  # others have their turn first next time
            nbytes = self._frames[slot].frame.nbytes
            if nbytes > nbytes_max - copied:
                break
            if _pages(nbytes) >= hopeless:
                continue
            room = self._extent(nbytes)
            if room is None:
                copied += await self._make_room(_pages(nbytes), nbytes_max - copied - nbytes)
                room = self._extent(nbytes)
            stored = self._frames.get(slot)  # another one by now, or none
            if room is None:
                hopeless = _pages(nbytes)
            elif stored is None or stored.offset or stored.frame.nbytes != nbytes:
                self.give_up(room)
            else:
                copied += await self._relocate(slot, stored, room)
                self.counters["arena:brought_in"] += 1
        return copied

    async def sync(self) -> None:
        """Host memory promises nothing across a crash: there is nothing to wait for."""

    def nbytes(self) -> int:
        return self._nbytes

    def flip_byte(self, place: Place, offset: int) -> bool:
        stored = self._find(place)
        if stored is not None:
            stored.frame[offset] ^= 1
        return stored is not None

    def check_integrity(self) -> None:
        """Independent walk: every page is free or of one extent; every stored frame has an extent."""
        taken = [(self._page_at(offset), extent.pages) for offset, extent in self._extents.items()]
        self._zones.check_integrity(taken)
        at = 0
        for first, pages in sorted(taken + self._withheld + self._free.free_runs()):
            assert first == at, f"page {at} has no owner or two"
            at += pages
        assert at == self._free.n_pages, "pages were lost at the arena's end"
        assert all(self._extents[f.offset].slot == slot for slot, f in self._frames.items() if f.offset)
        assert sorted(self._elsewhere) == sorted(s for s, f in self._frames.items() if not f.offset)
        kept = [self._extents[frame.offset] for frame in self._frames.values() if frame.offset]
        assert not any(extent.dropped for extent in kept), "the extent of a stored frame was dropped"
        assert len(set(map(id, kept))) == len(kept), "two slots share an extent"
        assert self._nbytes == sum(frame.frame.nbytes for frame in self._frames.values())

    # -- inside ------------------------------------------------------------------------------------

    async def _moved_in(self, frame: memoryview) -> memoryview:
        """A copy in the arena of a frame that came in a buffer of its caller's, if there is room."""
        room = self.allocate(frame.nbytes)
        if not self._offset_of(room):
            return frame
        await to_its_end(frame.nbytes, lambda: fill(room, frame), lambda: self.give_up(room))
        return room

    def _store(self, place: Place, frame: memoryview) -> None:
        offset = self._offset_of(frame)
        self._frames[place.slot] = Stored(place.generation, frame, offset)
        self._nbytes += frame.nbytes
        if offset:
            self._extents[offset].slot = place.slot
        else:
            self._elsewhere[place.slot] = None
            self.counters["arena:elsewhere"] += 1
        self._tell(place, offset, frame.nbytes)

    def _forget(self, slot: int) -> None:
        stored = self._frames.pop(slot)
        self._nbytes -= stored.frame.nbytes
        self._elsewhere.pop(slot, None)
        if stored.offset:
            self._drop(stored.offset)

    def _tell(self, place: Place, offset: int, nbytes: int) -> None:
        """Readers find the place's frame at `offset` from here on; at 0 they are to ask the shard. Whoever
        reads it this moment sees that it moved, not that it went."""
        if place.slot < self.geometry.slots:
            moved = self._rows[place.slot, GENERATION] == place.generation
            if moved:
                slot_table.move(self._rows, place.slot, offset, nbytes)
            else:
                slot_table.publish(self._rows, place.slot, place.generation, offset, nbytes)

    def _find(self, place: Place) -> Stored | None:
        stored = self._frames.get(place.slot)
        return stored if stored is not None and stored.generation == place.generation else None

    def _offset_of(self, frame: memoryview) -> int:
        """Where in the arena; 0 for a buffer that is not in it."""
        if frame.readonly:
            return 0
        offset = ctypes.addressof(ctypes.c_char.from_buffer(frame)) - self._base
        return offset if 0 < offset < self.geometry.nbytes else 0

    def _drop(self, offset: int) -> None:
        extent = self._extents[offset]
        extent.dropped = True
        if not extent.borrowers:
            self._free_extent(offset)

    def _free_extent(self, offset: int) -> None:
        pages = self._extents.pop(offset).pages
        first = self._page_at(offset)
        self._zones.remove(first)
        if offset in self._vacating:
            self._withheld.append((first, pages))
        else:
            self._free.give(first, pages)

    def _extent(self, nbytes: int) -> memoryview | None:
        """Room in the arena for a frame."""
        first = self._free.take(_pages(nbytes))
        return None if first is None else self._claim(first, nbytes)

    def _claim(self, first: int, nbytes: int) -> memoryview:
        """The room that begins at a page which was taken."""
        pages = _pages(nbytes)
        offset = self._offset_at(first)
        self._extents[offset] = Extent(pages)
        self._zones.add(first, pages)
        return self._arena[offset : offset + nbytes]

    def _offset_at(self, page: int) -> int:
        return self._data_offset + page * PAGE_NBYTES

    def _page_at(self, offset: int) -> int:
        return (offset - self._data_offset) // PAGE_NBYTES

    # -- compaction --------------------------------------------------------------------------------

    async def _make_room(self, pages: int, nbytes_max: int) -> int:
        """Move stored frames out of the way so that `pages` free pages may come together; bytes copied."""
        plan = self._zones.plan(pages, self._stays, nbytes_max // PAGE_NBYTES)
        if plan is None:
            return 0
        rooms = [self._claim(move.to, self._stored_at(move).frame.nbytes) for move in plan.moves]
        self._withheld = plan.gaps
        self._vacating = {self._offset_at(move.first) for move in plan.moves}
        copied = 0
        try:
            for offset in [self._offset_at(move.first) for move in plan.moves]:
                room = rooms.pop(0)
                extent = self._extents.get(offset)
                if extent is None or extent.dropped:
                    self.give_up(room)  # its frame was discarded since we planned
                else:
                    copied += await self._relocate(extent.slot, self._frames[extent.slot], room)
        finally:
            for room in rooms:
                self.give_up(room)
            for run in self._withheld:
                self._free.give(*run)
            self._withheld, self._vacating = [], set()
        self.counters["arena:moved_bytes"] += copied
        return copied

    def _stays(self, first: int) -> bool:
        extent = self._extents[self._offset_at(first)]
        return extent.slot == ARRIVING or extent.borrowers > 0 or extent.dropped

    def _stored_at(self, move: Move) -> Stored:
        return self._frames[self._extents[self._offset_at(move.first)].slot]

    async def _relocate(self, slot: int, stored: Stored, room: memoryview) -> int:
        """Copy a stored frame into `room`, and have it lie there if it is the slot's still; bytes copied.

        Its old extent is ours until then, as a borrower's: nobody gets it while we, or whoever borrowed it
        meanwhile, read from it.
        """
        if stored.offset:
            self._extents[stored.offset].borrowers += 1

        def abandoned() -> None:
            self.give_up(room)
            self.give_back(stored.frame)

        await to_its_end(room.nbytes, lambda: fill(room, stored.frame), abandoned)
        if self._frames.get(slot) is stored:
            offset = self._offset_of(room)
            self._frames[slot] = Stored(stored.generation, room, offset)
            self._extents[offset].slot = slot
            self._elsewhere.pop(slot, None)
            if slot < self.geometry.slots:
                slot_table.move(self._rows, slot, offset, room.nbytes)
            if stored.offset:
                self._drop(stored.offset)
        else:
            self.give_up(room)
        self.give_back(stored.frame)
        return room.nbytes


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES)
