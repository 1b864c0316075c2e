"""The table at an arena's start: where the frame of each slot lies, readable by who maps the arena.

One row of 32 bytes a slot, little-endian: generation, offset, nbytes, check. A reference (slot, generation)
is all a reader needs. The shard alone writes, in seqlock order: the generation is zeroed before anything
of a row or its bytes changes and set after all of it has. A reader looks at the row, copies the bytes, and
looks at the generation again: unchanged, it copied what the reference means; changed, its copy is void.

Python has no fences. On x86 stores and loads keep their order; a machine that reorders them could show an
old row with new bytes, which the checksum and identity of the reader's copy then refuse. The check word
does the same for a row that was seen half written. An offset of 0 (the table's own place) says that the
frame is not in the arena: ask the shard for it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

ROW_NBYTES: Final = 32
GENERATION, OFFSET, NBYTES, CHECK = range(4)  # columns
_SEAL: Final = 0x6B76_7374_7261_7461

Rows = npt.NDArray[np.uint64]


def rows_of(arena: memoryview, n_slots: int) -> Rows:
    """The table as an array of shape (n_slots, 4), a view into the arena."""
    return np.frombuffer(arena, dtype="<u8", count=n_slots * 4).reshape(n_slots, 4)


def publish(rows: Rows, slot: int, generation: int, offset: int, nbytes: int) -> None:
    """Make the slot's frame findable. The bytes must stand already."""
    row = rows[slot]
    row[GENERATION] = 0
    row[OFFSET] = offset
    row[NBYTES] = nbytes
    row[CHECK] = generation ^ offset ^ nbytes ^ _SEAL
    row[GENERATION] = generation


def withdraw(rows: Rows, slot: int) -> None:
    """From here on no reader begins; one that is copying will see that it was too late."""
    rows[slot, GENERATION] = 0


def are_current(seen: Rows, generations: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of these rows (copies, one a reference) are whole and of the generation asked for."""
    whole = seen[:, CHECK] == seen[:, GENERATION] ^ seen[:, OFFSET] ^ seen[:, NBYTES] ^ np.uint64(_SEAL)
    current: npt.NDArray[np.bool_] = (seen[:, GENERATION] == generations) & (generations != 0) & whole
    return current
