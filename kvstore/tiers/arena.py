"""Host memory in one arena that processes of this host may map: a slot table, then page-aligned frames.

The arena is a memfd. The shard maps it writable once, then seals it: nobody, the shard included, can ever
map or write it again, nor change its size, so that what a shard verified stays what it verified. It has no
name in any file system and is gone with its last holder, kill -9 included. Where the kernel cannot seal so
(FUTURE_WRITE, Linux 5.1), or has no memfd, the arena is private memory and `share` answers None.

Ownership of an extent:

    allocate -> arriving -> write -> stored under a place -> discard -> free
                   |                       \\-- borrowed: free when the last borrower gives it back
                   +-- give_up -> free

A frame that finds no extent (fragmentation; the arena is a quarter larger than the core's budget) lies in
a buffer of its own, which readers get through the shard; `counters` tells how many. Costs no copy on write
and one on read. Memory the arena has touched it keeps.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from kvstore import failpoints
from kvstore.nouns import Tier
from kvstore.tiers import slot_table
from kvstore.tiers.base import Place
from kvstore.tiers.copying import beside_the_loop, corrupted, fill, join, to_its_end
from kvstore.tiers.extents import PAGE_NBYTES, Extents
from kvstore.tiers.slot_table import GENERATION

SLOTS_MAX: Final = 1 << 20  # of the table: 32 MiB at most, touched as slots are used
SLACK: Final = 0.25  # of the budget, against fragmentation and page ends
_F_SEAL_FUTURE_WRITE: Final = 0x10  # Python names it from 3.13 on
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


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
        self._file: _File | None
        self._file, self._map = _sealed_memory(self.geometry.nbytes)
        self._arena = memoryview(self._map)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._rows = slot_table.rows_of(self._arena, slots)
        self._data_offset = table * PAGE_NBYTES
        self._free = Extents(pages - table)
        self._extents: dict[int, Extent] = {}  # by offset: all that is not free
        self._frames: dict[int, Stored] = {}  # by slot
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
        pages = _pages(nbytes)
        first = self._free.take(pages)
        if first is None:
            return np.empty(nbytes, dtype=np.uint8).data
        offset = self._data_offset + first * PAGE_NBYTES
        self._extents[offset] = Extent(pages)
        return self._arena[offset : offset + nbytes]

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
        self.discard(place)
        if place.slot < self.geometry.slots and place.slot not in self._frames:
            slot_table.publish(self._rows, place.slot, place.generation, 0, 0)

    def discard_slot(self, slot: int) -> None:
        """Forget whatever the slot holds. Readers are told before the bytes can change."""
        stored = self._frames.pop(slot, None)
        if stored is None:
            return
        if slot < self.geometry.slots:
            slot_table.withdraw(self._rows, slot)
        self._nbytes -= stored.frame.nbytes
        if stored.offset:
            self._drop(stored.offset)

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
        taken = [((o - self._data_offset) // PAGE_NBYTES, e.pages) for o, e in self._extents.items()]
        at = 0
        for first, pages in sorted(taken + self._free.free_runs()):
            assert first == at, f"page {at} has no owner or two"
            at += pages
        assert at == self._free.n_pages, "pages were lost at the arena's end"
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
        self.counters["arena:elsewhere"] += not offset
        if place.slot < self.geometry.slots:
            slot_table.publish(self._rows, place.slot, place.generation, offset, frame.nbytes)

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
        extent = self._extents.pop(offset)
        self._free.give((offset - self._data_offset) // PAGE_NBYTES, extent.pages)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES)


def _sealed_memory(nbytes: int) -> tuple[None, mmap.mmap] | tuple[_File, mmap.mmap]:
    """Memory, and its file if no other process can ever write it."""
    try:
        file = _File(os.memfd_create("kvstrata-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except (AttributeError, OSError):
        return None, mmap.mmap(-1, nbytes)
    try:
        os.ftruncate(file.fileno(), nbytes)
        mapped = mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_SHARED)
        fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    except OSError:  # no such seal here: without it a reader could write
        return None, mmap.mmap(-1, nbytes)
    return file, mapped


class _File:
    """A descriptor that is closed with its last holder."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)
