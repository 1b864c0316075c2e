"""The table at an arena's start: where the frame of each slot lies, readable by who maps the arena.

One row of 32 bytes a slot, little-endian: generation, offset, size, check. A reference (slot, generation)
is all a reader needs. The shard alone writes, in seqlock order: the generation is zeroed before anything
of a row or its bytes changes and set after all of it has. A reader looks at the row, copies the bytes, and
looks at the row again: unchanged, it copied what the reference means; of another generation, its copy is
void; of the same generation and different, the frame was moved, and the reader may look again.

    size = turn (20 bits) | nbytes (44 bits)

The turn counts how often the row was written: a frame that is moved away and back, while another one lay
in its place, leaves the offset as it was and the turn not. (A reader that sleeps for just 2^20 moves of one
frame is left to its checksum.) A move does not zero the generation, since the frame is there all the while:
it spoils the check word first and mends it last. Whoever looks between finds a row that is his and not
whole, and asks the shard.

Python has no fences. On x86 stores and loads keep their order; a machine that reorders them could show an
old row with new bytes, which the checksum and identity of the reader's copy then refuse. The check word
does the same for a row that was seen half written: of offset and turn a row shows both old or both new. An
offset of 0 (the table's own place) says that the frame is not in the arena: ask the shard for it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

ROW_NBYTES: Final = 32
GENERATION, OFFSET, SIZE, CHECK = range(4)  # columns
TURN_BITS: Final = 20
NBYTES_MAX: Final = (1 << 64 - TURN_BITS) - 1
_SEAL: Final = 0x6B76_7374_7261_7461
_U64: Final = (1 << 64) - 1

Rows = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


def rows_of(arena: memoryview, n_slots: int) -> Rows:
    """The table as an array of shape (n_slots, 4), a view into the arena."""
    return np.frombuffer(arena, dtype="<u8", count=n_slots * 4).reshape(n_slots, 4)


def publish(rows: Rows, slot: int, generation: int, offset: int, nbytes: int) -> None:
    """Make the slot's frame findable. The bytes must stand already."""
    row = rows[slot]
    size = _next_turn(int(row[SIZE])) | nbytes
    row[GENERATION] = 0
    row[OFFSET] = offset
    row[SIZE] = size
    row[CHECK] = generation ^ offset ^ size ^ _SEAL
    row[GENERATION] = generation


def move(rows: Rows, slot: int, offset: int, nbytes: int) -> None:
    """The slot's frame stands at `offset` too (0: elsewhere); from here on it is read there. Its old place
    may be given away when this has returned, not before."""
    row = rows[slot]
    size = _next_turn(int(row[SIZE])) | nbytes
    row[CHECK] = int(row[CHECK]) ^ _U64
    row[OFFSET] = offset
    row[SIZE] = size
    row[CHECK] = int(row[GENERATION]) ^ offset ^ size ^ _SEAL


def withdraw(rows: Rows, slot: int) -> None:
    """From here on no reader begins; one that is copying will see that it was too late."""
    rows[slot, GENERATION] = 0


def are_of(seen: Rows, generations: npt.NDArray[np.uint64]) -> Mask:
    """Which of these rows (copies, one a reference) are of the generation asked for, whole or not."""
    of: Mask = (seen[:, GENERATION] == generations) & (generations != 0)
    return of


def are_whole(seen: Rows) -> Mask:
    """Which were not seen while they were written."""
    whole: Mask = seen[:, CHECK] == seen[:, GENERATION] ^ seen[:, OFFSET] ^ seen[:, SIZE] ^ np.uint64(_SEAL)
    return whole


def nbytes_of(seen: Rows) -> npt.NDArray[np.uint64]:
    nbytes: npt.NDArray[np.uint64] = seen[:, SIZE] & np.uint64(NBYTES_MAX)
    return nbytes


def _next_turn(size: int) -> int:
    return (size & ~NBYTES_MAX) + NBYTES_MAX + 1 & _U64
