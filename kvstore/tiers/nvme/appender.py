"""One open segment of one disk: frames wait in its queue, are written in batches, synced, and sealed.

    queue -> submitted (a row, bytes on their way) -> written (readable from disk) -> kept (synced)

A disk has two: fresh frames, and copies that reclaiming makes. What survived once is likely to live on, so
copies are not mixed with fresh frames. Any error on a write or a sync ends the segment for ever: neither its
sync is tried again (a second one may report success for pages that were dropped) nor is anything written
behind it. Its rows that were not kept are dead. An error in the footer costs only a slower start.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvstore.tiers.nvme.buffers import Bytes
from kvstore.tiers.nvme.disk import Disk
from kvstore.tiers.nvme.layout import (
    FRAMES_AT,
    HEAD_NBYTES,
    PREFIX_NBYTES,
    Prefix,
    encode_prefix,
    footer_nbytes,
    record_nbytes,
)
from kvstore.tiers.nvme.notes import Scope
from kvstore.tiers.nvme.segment import Segment

_BATCH_RECORDS_MAX: Final = 1024
_NOTHING: Final = np.empty(0, dtype=np.uint8)


@dataclass(slots=True, eq=False)
class Pending:
    """A frame on its way to the disk. `alive` until it is discarded or forgotten."""

    record: Bytes
    nbytes: int  # of the frame
    sequence: int
    scope: Scope
    slot: int
    generation: int
    source: tuple[Segment, int] | None = None  # the row a copy is made of
    alive: bool = True
    segment: Segment | None = None
    row: int = -1

    def release(self) -> None:
        """The bytes are on the disk."""
        self.record = _NOTHING


def largest_frame(segment_nbytes: int) -> int:
    return segment_nbytes - FRAMES_AT - footer_nbytes(1) - PREFIX_NBYTES


class Appender:
    def __init__(
        self,
        disk: Disk,
        notes: Callable[[], int],
        written: Callable[[list[Pending]], None] | None,
        kept: Callable[[list[Pending]], None],
        lost: Callable[[Appender], None],
        *,
        copies: bool = False,
    ) -> None:
        self.disk = disk
        self.segment: Segment | None = None
        self.queued_nbytes = 0  # of records that are not written yet
        self._notes = notes  # how many journal entries are durable
        self._written = written
        self._kept = kept
        self._lost = lost  # after an error: nothing of `unkept` will be kept
        self._copies = copies
        self._queue: deque[Pending] = deque()
        self._submitted: list[Pending] = []  # in the open segment, not kept yet
        self._handle = -1
        self._turn = asyncio.Lock()

    def put(self, pending: Pending) -> None:
        self._queue.append(pending)
        self.queued_nbytes += pending.record.nbytes

    def unkept(self) -> Iterator[Pending]:
        """Everything that a crash may lose."""
        yield from self._submitted
        yield from self._queue

    def has_work(self, nbytes: int) -> bool:
        """Whether that much waits and nobody is at it."""
        return self.queued_nbytes >= nbytes and not self._turn.locked()

    async def drain(self) -> None:
        """Write what is queued. Raises OSError."""
        async with self._turn:
            await self._or_lose(self._drain())

    async def sync(self) -> None:
        """Make durable what is queued or written. Raises OSError."""
        async with self._turn:
            await self._or_lose(self._drain())
            await self._or_lose(self._sync())

    async def seal(self) -> None:
        """End the open segment, so that a start need not scan it. What is queued stays queued."""
        async with self._turn:
            if self.segment is not None:
                await self._or_lose(self._seal(self.segment))

    async def _or_lose(self, work: Awaitable[None]) -> None:
        try:
            await work
        except BaseException:
            self._lost(self)
            self._submitted = []
            raise

    async def _drain(self) -> None:
        while self._queue:
            if not self._queue[0].alive:
                self._pop()
                continue
            segment = await self._segment_for(self._queue[0])
            batch = self._submit(segment)
            if batch:  # all may have been discarded meanwhile
                await self._write(segment, batch)

    def _pop(self) -> Pending:
        pending = self._queue.popleft()
        self.queued_nbytes -= pending.record.nbytes
        return pending

    def _fits(self, segment: Segment, pending: Pending) -> bool:
        end = segment.end + record_nbytes(pending.nbytes)
        return end + footer_nbytes(len(segment) + 1) <= segment.nbytes

    async def _segment_for(self, pending: Pending) -> Segment:
        if self.segment is not None and not self._fits(self.segment, pending):
            await self._seal(self.segment)
        if self.segment is None:
            self.segment, self._handle = await self.disk.make(reserve=self._copies)
        return self.segment

    def _submit(self, segment: Segment) -> list[Pending]:
        """Give the queue's first frames their rows, as many as make a batch."""
        batch: list[Pending] = []
        nbytes = 0
        while self._queue and len(batch) < _BATCH_RECORDS_MAX:
            pending = self._queue[0]
            if pending.alive:
                too_many = batch and nbytes + pending.record.nbytes > self.disk.config.batch_nbytes
                if too_many or not self._fits(segment, pending):
                    break
                self._place(segment, pending)
                nbytes += pending.record.nbytes
                batch.append(pending)
            self._pop()
        # Until they are written they still take memory.
        self.queued_nbytes += nbytes
        self._submitted += batch
        return batch

    def _place(self, segment: Segment, pending: Pending) -> None:
        prefix = Prefix(
            segment.id, segment.end, pending.sequence, self._notes(), segment.synced, pending.nbytes
        )
        record = pending.record
        header = record[PREFIX_NBYTES:HEAD_NBYTES].data
        record[:PREFIX_NBYTES].data[:] = encode_prefix(prefix, header, self.disk.files.seal)
        pending.segment = segment
        pending.row = segment.append(pending.sequence, pending.nbytes, pending.scope)
        segment.heads += record[:HEAD_NBYTES].data

    async def _write(self, segment: Segment, batch: list[Pending]) -> None:
        handle, offset = self._handle, segment.offsets[batch[0].row]
        records = [pending.record for pending in batch]
        nbytes = sum(record.nbytes for record in records)
        try:
            await self.disk.threads.run(lambda: self.disk.files.append(handle, records, offset))
        except BaseException:
            await self._fail(segment)
            raise
        finally:
            self.queued_nbytes -= nbytes
        self.disk.counters["copied_nbytes" if self._copies else "fresh_nbytes"] += nbytes
        if self._written is not None:
            self._written(batch)
        for pending in batch:
            pending.release()

    async def _sync(self) -> None:
        segment, handle = self.segment, self._handle
        if segment is None or segment.synced == segment.end:
            return
        try:
            await self.disk.threads.run(lambda: self.disk.files.files.sync(handle))
        except BaseException:
            await self._fail(segment)
            raise
        segment.synced, segment.kept = segment.end, len(segment)
        kept, self._submitted = self._submitted, []
        self._kept([pending for pending in kept if pending.alive])

    async def _seal(self, segment: Segment) -> None:
        await self._sync()
        handle = self._handle
        self.segment = None
        disk = self.disk
        heads, end = segment.heads, segment.end
        try:
            segment.nbytes = await disk.threads.run(lambda: disk.files.finish(handle, segment.id, heads, end))
        except OSError:
            disk.counters["footer_error"] += 1
        await self._end(segment, handle)

    async def _fail(self, segment: Segment) -> None:
        """The segment is given up. What it kept stays readable."""
        if self.segment is segment:
            self.segment = None
            self.disk.counters["segments_failed"] += 1
            await self._end(segment, self._handle)

    async def _end(self, segment: Segment, handle: int) -> None:
        self.disk.close(segment)
        await self.disk.threads.run(lambda: self.disk.files.files.close(handle))
