"""One segment file as the shard knows it: packed columns, one row a record, and what may be done with it.

    OPEN    records are appended; the rows below `kept` are durable
    CLOSED  nothing is written to it any more: sealed by its footer, or given up after an error

A row is live while a slot has it. 40 bytes a row, nothing of it looked at by the garbage collector. A file
goes when no row is live and nobody reads from it.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvstore.tiers.nvme.layout import BLOCK_NBYTES, FRAMES_AT, footer_nbytes, record_nbytes
from kvstore.tiers.nvme.notes import Scope

DEAD: Final = -1
UNADOPTED: Final = -2
"""Recovered, and not yet named by the shard: as live as any, until the first write."""


class Segment:
    __slots__ = (
        *("number", "id", "path", "nbytes", "end", "synced", "kept", "is_open", "opaque", "readers", "heads"),
        *("offsets", "sizes", "sequences", "slots", "generations", "live_nbytes", "oldest", "closed_as"),
    )

    def __init__(self, number: int, segment_id: int, path: Path, nbytes: int) -> None:
        self.number = number  # in this life: what the index knows it by
        self.id = segment_id
        self.path = path
        self.nbytes = nbytes  # what it takes on the disk
        self.end = FRAMES_AT  # where the next record goes
        self.synced = FRAMES_AT  # durable up to here
        self.kept = 0  # rows below it are durable
        self.is_open = False
        self.opaque = False  # it may hold records that nobody knows of
        self.readers = 0
        self.closed_as = 0  # how many segments were closed before it: its age
        self.heads = bytearray()  # of the rows, for the footer; while it is open
        self.offsets = array("Q")
        self.sizes = array("I")  # of frames
        self.sequences = array("Q")
        self.slots = array("q")
        self.generations = array("Q")
        self.live_nbytes = 0  # on disk, padding included
        self.oldest: dict[Scope, int] = {}  # the least sequence number of each namespace's epoch

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def is_reclaimable(self) -> bool:
        """Whether its file may go."""
        return not self.is_open and not self.live_nbytes and not self.readers

    def append(self, sequence: int, frame_nbytes: int, scope: Scope) -> int:
        """Room for one record, dead until it is given to a slot. The row."""
        self.offsets.append(self.end)
        self.sizes.append(frame_nbytes)
        self.sequences.append(sequence)
        self.slots.append(DEAD)
        self.generations.append(0)
        self.end += record_nbytes(frame_nbytes)
        self.oldest[scope] = min(sequence, self.oldest.get(scope, sequence))
        return len(self.offsets) - 1

    def give(self, row: int, slot: int, generation: int) -> None:
        """The row is that slot's from here on."""
        if self.slots[row] == DEAD:
            self.live_nbytes += record_nbytes(self.sizes[row])
        self.slots[row] = slot
        self.generations[row] = generation

    def kill(self, row: int) -> None:
        if self.slots[row] != DEAD:
            self.slots[row] = DEAD
            self.live_nbytes -= record_nbytes(self.sizes[row])

    def kill_unadopted(self) -> None:
        for row, slot in enumerate(self.slots):
            if slot == UNADOPTED:
                self.kill(row)

    def live_rows(self) -> Iterator[int]:
        return (row for row, slot in enumerate(self.slots) if slot != DEAD)

    @property
    def live_share(self) -> float:
        return self.live_nbytes / max(self.nbytes, BLOCK_NBYTES)

    @property
    def gain_nbytes(self) -> int:
        """What copying out its live rows would free: dead records, and room it was never filled to."""
        return self.nbytes - FRAMES_AT - footer_nbytes(len(self)) - self.live_nbytes


class Segments:
    """Every segment of every disk, by number."""

    def __init__(self) -> None:
        self.by_number: dict[int, Segment] = {}
        self._numbers = itertools.count()

    def add(self, segment_id: int, path: Path, nbytes: int) -> Segment:
        segment = Segment(next(self._numbers), segment_id, path, nbytes)
        self.by_number[segment.number] = segment
        return segment
