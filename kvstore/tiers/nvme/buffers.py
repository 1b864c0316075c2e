"""Page-aligned memory for direct I/O, laid out as a record: a prefix, a frame, zeros up to a whole block.

A caller that has its frame's room from `room_for` writes it in place, and the disk takes it from there. The
memory is the allocator's (aligned by us, which is all O_DIRECT asks), not a fresh mapping a buffer: freed
buffers come back without a page fault a page, 0.3 to 3 ms a MiB on a virtual machine (kvstore/memory.py),
and nobody has to say when a reader is done with one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.tiers.nvme.layout import BLOCK_NBYTES, PREFIX_NBYTES, record_nbytes

Bytes = npt.NDArray[np.uint8]


class _Room(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """A frame's part of a record's buffer; `record` is the whole."""

    record: Bytes | None = None


def aligned(nbytes: int) -> Bytes:
    """Fresh memory of unknown content at a page boundary."""
    raw = np.empty(nbytes + BLOCK_NBYTES, dtype=np.uint8)
    start = -raw.ctypes.data % BLOCK_NBYTES
    return raw[start : start + nbytes]


def room_for(frame_nbytes: int) -> memoryview:
    """Where a frame is written so that `record_of` need not copy it."""
    record = aligned(record_nbytes(frame_nbytes))
    room = record[PREFIX_NBYTES : PREFIX_NBYTES + frame_nbytes].view(_Room)
    room.record = record
    return room.data


def record_of(frame: memoryview) -> Bytes:
    """The record's buffer around `frame`: its own if it came from `room_for`, else a copy."""
    room = frame.obj
    if isinstance(room, _Room) and room.record is not None and room.nbytes == frame.nbytes:
        record = room.record
    else:
        record = aligned(record_nbytes(frame.nbytes))
        record[PREFIX_NBYTES : PREFIX_NBYTES + frame.nbytes] = np.frombuffer(frame, dtype=np.uint8)
    record[PREFIX_NBYTES + frame.nbytes :] = 0
    return record


def frame_of(record: Bytes, frame_nbytes: int) -> memoryview:
    return record[PREFIX_NBYTES : PREFIX_NBYTES + frame_nbytes].data
