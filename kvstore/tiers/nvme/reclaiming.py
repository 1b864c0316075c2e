"""Reclaiming: what lives in the emptiest segments is copied out, then their files go.

Victims are chosen greedily, the least live share first, the oldest of equals. The cost-benefit rule of
log-structured file systems (Rosenblum & Ousterhout, 1991) weighs a segment's age, since what was not
overwritten for long is taken to stay. In a cache it is the other way round: what is oldest is what is evicted
next, and copying it would be for nothing. Nothing is reclaimed before room is short: each moment that a
victim waits, more of it dies.

What it costs: with a share u of the disk live and deletes at random, a victim is still live to u' with
u = (u' - 1) / ln u' (Desnoyers, 2014, and others), and each byte written costs 1 / (1 - u') bytes of writing:
1.9 at u = 0.70, 2.0 at 0.72, 2.7 at 0.80. Under LRU whole segments die together: 1.0 to 1.1. `utilisation`
bounds u, which is what `room_nbytes` tells the shard. Figures: docs/benchmarks.md, "The NVMe tier".

A copy keeps its frame's sequence number, so that a purge means the same for it, and is verified on the way.
The index points to it, and the old file goes, only once the copy is durable.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import structlog

from kvstore.errors import CorruptBlock
from kvstore.frame import decode_frame
from kvstore.nouns import NamespaceId
from kvstore.tiers.nvme.appender import Appender, Pending
from kvstore.tiers.nvme.buffers import Bytes, frame_of
from kvstore.tiers.nvme.disk import Disk
from kvstore.tiers.nvme.layout import Prefix, record_nbytes
from kvstore.tiers.nvme.segment import DEAD, Segment
from kvstore.tiers.nvme.threads import Threads

log = structlog.get_logger(__name__)

FREE_SEGMENTS_MIN = 2
"""Fewer than these free: reclaim, so that a segment is ready when the open one is full."""
GAIN_MIN = 1 / 64
"""What a victim's copying must free, as a share of it: without dead records it would go round for ever."""
_Read = tuple[int, Bytes, Prefix | None]


class Reclaimer:
    """Runs while the tier writes; woken by who wants room. One victim at a time on each disk."""

    def __init__(
        self,
        disks: Sequence[tuple[Disk, Appender]],
        threads: Threads,
        counters: Counter[str],
        dropped: Callable[[Segment, int], None],
    ) -> None:
        self._disks = disks
        self._threads = threads
        self._counters = counters
        self._dropped = dropped  # a row turned out to be lost
        self._wanted = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def wake(self) -> None:
        self._wanted.set()

    def start(self) -> None:
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            for disk, copies in self._disks:
                try:
                    await self.reclaim(disk, copies)
                except OSError as error:
                    # The victim stays as it is. Whoever waits for room wakes us again, within its own bound.
                    self._counters["reclaim_error"] += 1
                    log.warning("reclaiming failed", directory=str(disk.directory), error=str(error))

    async def reclaim(self, disk: Disk, copies: Appender) -> None:
        """Until the disk has room, or nothing is left to gain. Raises OSError."""
        await self._remove_dead(disk)
        while (victim := self._victim(disk)) is not None:
            await self._copy_out(victim, copies)
            await self._remove_dead(disk)
            if victim.number in disk.segments:
                return  # somebody reads it: the last one wakes us

    async def _remove_dead(self, disk: Disk) -> None:
        for segment in [s for s in disk.segments.values() if s.is_reclaimable]:
            await disk.remove(segment)

    def _victim(self, disk: Disk) -> Segment | None:
        if disk.free_segments >= FREE_SEGMENTS_MIN:
            return None
        closed = [
            segment
            for segment in disk.segments.values()
            if not segment.is_open
            and segment.live_nbytes
            and segment.gain_nbytes >= GAIN_MIN * segment.nbytes
        ]
        return min(closed, key=lambda s: (s.live_share, s.closed_as), default=None)

    async def _copy_out(self, victim: Segment, copies: Appender) -> None:
        rows = list(victim.live_rows())
        while rows:
            some, rows = _split(victim, rows, copies.disk.config.batch_nbytes)
            victim.readers += 1
            try:
                found = await self._threads.run(lambda rows=some: _read(victim, rows, copies.disk))  # type: ignore[misc]
            finally:
                victim.readers -= 1
            for row, record, prefix in found:
                if victim.slots[row] == DEAD:
                    continue  # discarded meanwhile
                if prefix is None:
                    self._dropped(victim, row)
                    continue
                namespace = NamespaceId(record[96:112].tobytes())
                scope = namespace, int.from_bytes(record[208:216].tobytes(), "little")
                slot, generation = victim.slots[row], victim.generations[row]
                copies.put(
                    Pending(record, prefix.nbytes, prefix.sequence, scope, slot, generation, (victim, row))
                )
            await copies.drain()
        await copies.sync()


def _split(victim: Segment, rows: list[int], nbytes_max: int) -> tuple[list[int], list[int]]:
    """As many rows as fit one batch, and the rest."""
    nbytes, count = 0, 0
    for row in rows:
        nbytes += record_nbytes(victim.sizes[row])
        if count and nbytes > nbytes_max:
            break
        count += 1
    return rows[:count], rows[count:]


def _read(victim: Segment, rows: Sequence[int], disk: Disk) -> list[_Read]:
    """The rows' records, each verified; without a prefix where it is not whole."""
    found: list[_Read] = []
    for row in rows:
        nbytes = victim.sizes[row]
        record, prefix = disk.files.read(victim.path, victim.id, victim.offsets[row], nbytes)
        if prefix is not None:
            try:
                decode_frame(frame_of(record, nbytes))
            except CorruptBlock:
                prefix = None
        found.append((row, record, prefix))
    return found
