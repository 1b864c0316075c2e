"""Reading a shard's arena from another process: no round trip, no lock, and never other data.

Look the reference up in the slot table, copy, look again (tiers/slot_table.py): a copy whose row changed
meanwhile is void. Where the row is still of our generation the shard has only moved the frame: we look once
more, then ask the shard, and never take another frame's bytes for a corrupt block. Offsets and sizes that do
not lie in the arena are not believed. What was copied is then verified like anything that came over a wire.
Runs in threads: numpy's copy and xxh3 let go of the lock.

A payload is copied whole, then hashed. Doing both in pieces that stay in the cache was not faster here:
large copies go past the cache (docs/devlog.md).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockRef, Incarnation, MissReason
from kvstore.tiers import slot_table
from kvstore.tiers.arena import Geometry
from kvstore.tiers.extents import PAGE_NBYTES
from kvstore.transport.landing import NOTHING, Landing, copy, copy_and_hash

LOOKS: Final = 2  # at a frame that is moved under our hands; then the shard reads it

Columns = npt.NDArray[np.uint64]


class ArenaReader:
    """One shard's arena, in one incarnation, mapped read-only."""

    def __init__(self, mapped: mmap.mmap, geometry: Geometry, incarnation: Incarnation) -> None:
        """Raises ValueError for a geometry that does not fit the memory."""
        table_nbytes = geometry.slots * slot_table.ROW_NBYTES
        if table_nbytes > geometry.nbytes or geometry.nbytes > len(mapped) or geometry.nbytes % PAGE_NBYTES:
            raise ValueError(f"an arena of {geometry.nbytes} bytes with {geometry.slots} slots")
        self.incarnation = incarnation
        self._slots = geometry.slots
        self._arena = memoryview(mapped)[: geometry.nbytes]
        self._pages = np.frombuffer(self._arena, dtype=np.uint8).reshape(-1, PAGE_NBYTES)
        self._rows = slot_table.rows_of(memoryview(mapped), geometry.slots)
        self._data_offset = table_nbytes

    @property
    def memory(self) -> memoryview:
        """All of the map."""
        return self._arena

    def read_into(self, refs: Sequence[BlockRef], landing: Landing, rows: Sequence[int]) -> list[int]:
        """Fill the rows; positions in `refs` of those whose frames the arena does not hold: ask the shard.

        A reference that is past is voided as STALE_REFERENCE, before or after its bytes were copied. A frame
        that was moved while we copied is copied once more, and left to the shard if it moved again.
        """
        asked, moved = self._read_into(refs, landing, rows)
        if moved:
            again, still = self._read_into([refs[i] for i in moved], landing, [rows[i] for i in moved])
            asked += [moved[i] for i in (*again, *still)]
        return asked

    def _read_into(
        self, refs: Sequence[BlockRef], landing: Landing, rows: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Positions to ask the shard for, and positions that moved under us: their rows hold nothing."""
        slots, generations, elsewhere = self._columns(refs)
        seen = self._rows[slots]
        ours = slot_table.are_of(seen, generations) & ~elsewhere
        readable = self._readable(seen) & ours
        found = np.flatnonzero(readable)
        into = np.asarray(rows, dtype=np.int64)[found]
        offsets = seen[found, slot_table.OFFSET].astype(np.int64)
        ends = offsets + slot_table.nbytes_of(seen[found]).astype(np.int64)
        starts = offsets + HEADER_NBYTES
        landing.headers[into] = self._pages[offsets // PAGE_NBYTES, :HEADER_NBYTES]
        arena, checksums = self._arena, []
        for row, start, end in zip(into.tolist(), starts.tolist(), ends.tolist(), strict=True):
            room = landing.room(row, end - start)
            checksums.append(0 if room is None else copy_and_hash(room, arena[start:end]))
        landing.checksums[into] = checksums
        landing.payload_nbytes[into] = ends - starts
        again = self._rows[slots[found]]
        late = ~slot_table.are_of(again, generations[found])
        moved = (again != seen[found]).any(axis=1) & ~late
        landing.payload_nbytes[into[moved]] = NOTHING
        for i in [*found[late].tolist(), *np.flatnonzero(~ours & ~elsewhere).tolist()]:
            landing.void(rows[i], MissReason.STALE_REFERENCE)
        asked: list[int] = np.flatnonzero(elsewhere | (ours & ~readable)).tolist()
        return asked, found[moved].tolist()

    def read(self, ref: BlockRef) -> npt.NDArray[np.uint8] | MissReason | None:
        """A copy of one whole frame, the reason why not, or None: ask the shard."""
        slots, generations, elsewhere = self._columns([ref])
        if elsewhere[0]:
            return None
        for _ in range(LOOKS):
            seen = self._rows[slots]
            if not slot_table.are_of(seen, generations)[0]:
                return MissReason.STALE_REFERENCE
            if not self._readable(seen)[0]:
                return None
            offset, nbytes = int(seen[0, slot_table.OFFSET]), int(slot_table.nbytes_of(seen)[0])
            copied = np.empty(nbytes, dtype=np.uint8)
            copy(copied.data, self._arena[offset : offset + nbytes])
            if self._rows[slots].tobytes() == seen.tobytes():
                return copied
        past = not slot_table.are_of(self._rows[slots], generations)[0]
        return MissReason.STALE_REFERENCE if past else None

    def _columns(self, refs: Sequence[BlockRef]) -> tuple[Columns, Columns, npt.NDArray[np.bool_]]:
        """Slots, generations, and whose row this table does not have (their slot reads 0 here)."""
        incarnation = self.incarnation
        slots = np.array([ref[2] for ref in refs], dtype=np.uint64)
        generations = np.array([ref[3] for ref in refs], dtype=np.uint64)
        others = np.array([ref[1] != incarnation for ref in refs], dtype=np.bool_)
        elsewhere = others | (slots >= self._slots)
        slots[elsewhere] = 0
        return slots, generations, elsewhere

    def _readable(self, seen: slot_table.Rows) -> npt.NDArray[np.bool_]:
        """Which rows are whole and mean bytes that lie in the arena."""
        offsets, sizes = seen[:, slot_table.OFFSET], slot_table.nbytes_of(seen)
        size = np.uint64(self._arena.nbytes)
        aligned = offsets % np.uint64(PAGE_NBYTES) == 0
        inside = (offsets >= self._data_offset) & (offsets <= size)
        fitting = (sizes >= HEADER_NBYTES) & (sizes <= size - np.minimum(offsets, size))
        readable: npt.NDArray[np.bool_] = slot_table.are_whole(seen) & aligned & inside & fitting
        return readable
