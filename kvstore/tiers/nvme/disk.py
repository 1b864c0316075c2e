"""One directory: its segments, what they take of its budget, and the making and removing of them.

Fresh frames may fill the budget up to one segment, which is kept for reclaiming: the copies of what lives in
a victim need room before the victim's file goes. Reclaiming itself is never refused a segment: it works on
one victim at a time, and would otherwise stand still on a disk whose budget was made smaller.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.segment import Segment, Segments
from kvstore.tiers.nvme.segment_files import SegmentFiles, segment_path
from kvstore.tiers.nvme.threads import Threads


class Disk:
    def __init__(
        self,
        directory: Path,
        config: NvmeConfig,
        files: SegmentFiles,
        threads: Threads,
        counters: Counter[str],
        every: Segments,
        draw: Callable[[int], int],
    ) -> None:
        self.directory = directory
        self.config = config
        self.files = files
        self.threads = threads
        self.counters = counters
        self.segments: dict[int, Segment] = {}  # by number
        self.load_nbytes = 0  # what lives here, as last counted, and what was given since
        self.unsure = False  # a removed file may be there again after a crash
        self.wants_room: Callable[[], None] = lambda: None  # somebody waits for room, or soon will
        self.begin_life: Callable[[], Awaitable[None]] | None = None  # before anything is written
        self._every = every
        self._draw = draw
        self._closed = 0
        self._making = 0
        self._freed = asyncio.Event()

    def settle_names(self) -> None:
        """What a start finds here, and what it does not, stays so: the process before may have been killed
        between an unlink and the sync of the directory. Synchronous, for a thread."""
        try:
            self.files.files.sync_directory(self.directory)
        except OSError:
            self.unsure = True

    def add(self, segment_id: int, path: Path, nbytes: int) -> Segment:
        segment = self._every.add(segment_id, path, nbytes)
        self.segments[segment.number] = segment
        return segment

    def count(self) -> None:
        """See what lives here: at start, and with every segment made or removed."""
        self.load_nbytes = sum(segment.live_nbytes for segment in self.segments.values())

    @property
    def used_nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments.values()) + self._making

    @property
    def free_segments(self) -> int:
        """How many segments fresh frames may still open. Negative below the reserve."""
        return (self.config.directory_nbytes - self.used_nbytes) // self.config.segment_nbytes - 1

    async def make(self, *, reserve: bool) -> tuple[Segment, int]:
        """A new segment to append to, and its handle. Raises OSError, ENOSPC if no room came in time."""
        if self.begin_life is not None:
            await self.begin_life()
        if not reserve:
            await self._room()
        nbytes = self.config.segment_nbytes
        self._making += nbytes
        try:
            segment_id = self._draw(64)
            path = segment_path(self.directory, segment_id)
            handle = await self.threads.run(lambda: self.files.make(path, segment_id, nbytes))
        finally:
            self._making -= nbytes
        segment = self.add(segment_id, path, nbytes)
        segment.is_open = True
        self.count()
        if self.free_segments < 1:
            self.wants_room()
        return segment, handle

    def close(self, segment: Segment) -> None:
        """Nothing is appended to it any more."""
        segment.is_open = False
        segment.heads = bytearray()
        self._closed += 1
        segment.closed_as = self._closed
        if segment.is_reclaimable:
            self.wants_room()

    async def remove(self, segment: Segment) -> None:
        """Unlink what holds nothing that lives. Raises OSError."""
        try:
            await self.threads.run(lambda: self.files.remove(segment.path))
        except OSError:
            self.unsure = True
            raise
        self.segments.pop(segment.number, None)
        self._every.by_number.pop(segment.number, None)
        self.counters["segments_removed"] += 1
        self.count()
        self._freed.set()

    async def _room(self) -> None:
        """Until a segment may be opened. Raises OSError (ENOSPC) when that took longer than configured."""
        try:
            async with asyncio.timeout(self.config.write_wait_s):
                while self.free_segments < 1:
                    self._freed.clear()
                    self.counters["waits_for_room"] += 1
                    self.wants_room()
                    await self._freed.wait()
        except TimeoutError:
            raise OSError(
                errno.ENOSPC,
                f"{self.directory} is full: nothing could be reclaimed in {self.config.write_wait_s} s. "
                "Evict from the tier, or raise disk_nbytes",
            ) from None
