"""The NVMe tier: a log of segments on one or several disks, and a journal of notes beside it.

A frame that is written can be read at once, from memory until it is on the disk. A batch goes out when there
is enough of it, or when somebody syncs. Reads are whole records by O_DIRECT into fresh page-aligned memory.
Everything here runs on one event loop; files are touched in a bounded pool of threads.

How it fails. An error on a write or a sync ends that segment, and everything not kept yet is forgotten, on
every disk: the syncs that run, or the next one, raise. A full disk is such an error; as soon as there is room
again, writing goes on. What a disk cannot read back is a miss (None) and a counter; other errors of a read
raise. Counters: `counters`.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from kvstore import failpoints
from kvstore.frame import HEADER_NBYTES, decode_header
from kvstore.nouns import Tier
from kvstore.tiers.base import Place
from kvstore.tiers.copying import beside_the_loop, corrupted, join
from kvstore.tiers.durable import Note, Recovered
from kvstore.tiers.nvme.appender import Appender, Pending, largest_frame
from kvstore.tiers.nvme.buffers import frame_of, record_of, room_for
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.files import DiskFiles, Files
from kvstore.tiers.nvme.gate import ByteGate
from kvstore.tiers.nvme.index import Index
from kvstore.tiers.nvme.layout import record_nbytes
from kvstore.tiers.nvme.oldest import Oldest, find_oldest
from kvstore.tiers.nvme.reclaiming import Reclaimer
from kvstore.tiers.nvme.recovery import Found, Opened, open_directories
from kvstore.tiers.nvme.segment import UNADOPTED, Segment
from kvstore.tiers.nvme.threads import Threads

Result = TypeVar("Result")

_OPEN_RESERVE_SEGMENTS: Final = 3
"""Of each disk, beyond the utilisation: two open segments that are half full, one to reclaim into."""


class NvmeTier:
    tier = Tier.NVME

    def __init__(
        self,
        config: NvmeConfig,
        files: Files | None = None,
        threads: Threads | None = None,
        draw: Callable[[int], int] = secrets.randbits,
    ) -> None:
        """`files`, `threads` and `draw` (random bits) are given by tests."""
        self.config = config
        self.files = files or DiskFiles()
        self.counters: Counter[str] = Counter()
        self._threads = threads or Threads(ThreadPoolExecutor(config.io_threads, "nvme"))
        self._draw = draw
        self._opened: Opened | None = None
        self._found: Found | None = None  # until the first write
        self._fresh: list[Appender] = []
        self._copies: list[Appender] = []
        self._reclaimer: Reclaimer | None = None
        self._index = Index()
        self._beginning: set[int] = set()  # sequence numbers of writes that are not queued yet
        self._sequence = 0  # the next one to be given out
        self._reads = ByteGate(config.read_nbytes_max)
        self._drained = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unconfirmed: dict[int, Place] = {}  # by sequence number: no sync has told that it is kept
        self._losses = 0
        self._losses_told = 0
        self._last_lost = -1  # the greatest sequence number that was lost
        self._error: OSError | None = None  # the last one that lost something
        self._closed = False

    # -- start and end -----------------------------------------------------------------------------

    async def recover(self) -> Recovered:
        """Raises ConfigError for directories that are not ours, are in use, or whose journal is damaged."""
        assert self._opened is None, "recover is called once"
        opened = await open_directories(self.config, self.files, self._threads, self.counters, self._draw)
        self._opened, self._found = opened, opened.found
        self._index.segments = opened.every.by_number
        opened.journal.find_oldest = self._find_oldest
        self._sequence = opened.journal.first_sequence
        for disk in opened.disks:
            self._fresh.append(Appender(disk, self._notes, self._written, self._kept, self._lose))
            copies = Appender(disk, self._notes, None, self._moved, self._lose_copies, copies=True)
            self._copies.append(copies)
        disks = list(zip(opened.disks, self._copies, strict=True))
        self._reclaimer = Reclaimer(disks, self._threads, self.counters, self._unreadable)
        for disk in opened.disks:
            disk.wants_room = self._reclaimer.wake
            disk.begin_life = opened.journal.begin
        oldest, state = await self._find_oldest(), opened.journal.state
        await self._threads.run(lambda: state.forget(oldest))  # the first rewrite makes it durable
        notes = tuple(state.notes())
        return Recovered(notes, opened.found.blocks, dict(self.counters))

    def adopt(self, record: int, place: Place) -> None:
        assert self._found is not None, "a record is adopted after recover and before the first write"
        segment, row = self._found.segments[record], int(self._found.rows[record])
        assert segment.slots[row] == UNADOPTED, f"record {record} is adopted already"
        self._index.adopt(segment, row, place)

    async def close(self) -> None:
        """Open segments get their footers, so that the next start need not scan them."""
        if self._closed:
            return
        self._closed = True
        if self._reclaimer is not None:
            await self._reclaimer.stop()
        if self._tasks:
            await asyncio.wait(self._tasks)  # each is bounded by write_wait_s
        for appender in (*self._fresh, *self._copies):
            try:
                await appender.seal()
            except OSError:
                self.counters["seal_error"] += 1
        if self._opened is not None:
            await self._opened.journal.close()
            for lock in self._opened.locks:
                self.files.close(lock)
        self._threads.close()

    # -- TierStorage -------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> memoryview:
        return room_for(nbytes)

    def give_up(self, frame: memoryview) -> None:
        """The allocator has it back as soon as nobody holds it."""

    async def write(self, place: Place, frame: memoryview) -> None:
        """Raises OSError when there was no room in time, CorruptBlock for what is no whole frame's header."""
        sequence = self._begin(frame)
        try:
            if await failpoints.hit("storage.write") is failpoints.Effect.DROP:
                return
            meta = decode_header(frame[:HEADER_NBYTES]).meta
            if self._index.generation(place.slot) >= place.generation:
                return  # late: these bytes are here, or the slot was given to somebody else meanwhile
            record = await beside_the_loop(frame.nbytes, lambda: record_of(frame))
            if (kept := self._index.generation(place.slot)) >= place.generation:
                return
            self.discard(Place(place.slot, kept))
            scope = meta.namespace, meta.epoch.number
            pending = Pending(record, frame.nbytes, sequence, scope, place.slot, place.generation)
            self._index.queue(pending)
            self._unconfirmed[sequence] = place
            appender = self._least_loaded()
            appender.put(pending)
            appender.disk.load_nbytes += frame.nbytes
        finally:
            self._beginning.discard(sequence)
        if appender.has_work(min(self.config.batch_nbytes, self.config.queue_nbytes_max)):
            self._spawn(self._drain(appender))
        await self._wait_for_room(place)

    async def read(self, place: Place) -> memoryview | None:
        pending = self._index.queued(place)
        if pending is None:
            return await self.borrow(place)
        frame = frame_of(pending.record, pending.nbytes)
        return await beside_the_loop(frame.nbytes, lambda: join(frame))

    async def borrow(self, place: Place) -> memoryview | None:
        effect = await failpoints.hit("storage.read")
        if effect is failpoints.Effect.DROP:
            return None
        pending = self._index.queued(place)
        if pending is not None:
            frame: memoryview | None = frame_of(pending.record, pending.nbytes)
        else:
            frame = await self._read(place)
        return corrupted(frame) if frame and effect is failpoints.Effect.CORRUPT else frame

    def give_back(self, frame: memoryview) -> None:
        """Whoever holds a frame keeps it alive."""

    def discard(self, place: Place) -> None:
        segment = self._index.discard(place)
        if segment is not None and segment.is_reclaimable:
            self._wake()

    def leave(self, place: Place) -> None:
        self.discard(place)

    async def sync(self) -> None:
        # A write that is not queued yet may miss this sync: it belongs to the next one.
        told, before = self._losses_told, min(self._beginning, default=self._sequence)
        syncs = [appender.sync() for appender in self._fresh]
        done = await self._to_its_end(asyncio.gather(*syncs, return_exceptions=True))
        for error in done:
            if isinstance(error, OSError):
                self._error = error
            elif isinstance(error, BaseException):
                raise error
        if self._losses > told:
            self._losses_told = self._losses
            self._forget()
            if self._last_lost >= before:
                self._losses += 1  # written since: their own sync is yet to come, and raises
            raise self._error or OSError(errno.EIO, "frames were lost before they were kept")
        for sequence in [sequence for sequence in self._unconfirmed if sequence < before]:
            del self._unconfirmed[sequence]

    def nbytes(self) -> int:
        return self._index.nbytes

    # -- DurableTier -------------------------------------------------------------------------------

    async def note(self, note: Note) -> None:
        assert self._opened is not None, "recover comes first"
        await self._to_its_end(self._opened.journal.append(note, self._sequence))

    def room_nbytes(self) -> int:
        """Frames of a few KiB waste a part of their last block: what is held now says how much."""
        config = self.config
        usable = config.directory_nbytes - _OPEN_RESERVE_SEGMENTS * config.segment_nbytes
        held = self._index
        share = held.nbytes / held.disk_nbytes if held.disk_nbytes else 1.0
        return int(len(config.directories) * usable * config.utilisation * share)

    # -- inside: writing ---------------------------------------------------------------------------

    def _begin(self, frame: memoryview) -> int:
        """A write's place in the order of purges: taken before anything is waited for."""
        assert self._opened is not None, "recover comes first"
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the nvme tier is closed")
        if frame.nbytes > largest_frame(self.config.segment_nbytes):
            raise OSError(
                errno.EFBIG, f"a frame of {frame.nbytes} bytes fits no segment: raise segment_nbytes"
            )
        if self._found is not None:
            self._found = None
            for segment in self._opened.every.by_number.values():
                segment.kill_unadopted()
            for disk in self._opened.disks:
                disk.count()
            if self._reclaimer is not None:
                self._reclaimer.start()
            self._wake()
        sequence = self._sequence
        self._sequence += 1
        self._beginning.add(sequence)
        return sequence

    def _least_loaded(self) -> Appender:
        """Of the disks that keep up, the one with the least on it: a full disk takes nothing while another
        has room."""
        batch_nbytes = self.config.batch_nbytes
        return min(self._fresh, key=lambda each: (each.queued_nbytes // batch_nbytes, each.disk.load_nbytes))

    async def _wait_for_room(self, place: Place) -> None:
        try:
            async with asyncio.timeout(self.config.write_wait_s):
                while sum(appender.queued_nbytes for appender in self._fresh) > self.config.queue_nbytes_max:
                    self._drained.clear()
                    await self._drained.wait()
        except TimeoutError:
            self.discard(place)
            self.counters["write_timeout"] += 1
            raise OSError(
                errno.EAGAIN, f"the disks did not keep up for {self.config.write_wait_s} s"
            ) from None

    async def _drain(self, appender: Appender) -> None:
        try:
            await appender.drain()
        except OSError as error:
            self._error = error  # the next sync raises it

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _to_its_end(self, work: Awaitable[Result]) -> Result:
        """What was begun is done, also when the caller is cancelled meanwhile."""

        async def run() -> Result:
            return await work

        return await asyncio.shield(self._spawn(run()))

    def _notes(self) -> int:
        assert self._opened is not None
        return self._opened.journal.number

    def _written(self, batch: list[Pending]) -> None:
        for pending in batch:
            if pending.alive and pending.segment is not None:
                self._index.land(pending, pending.segment)
        self._drained.set()

    def _kept(self, pendings: list[Pending]) -> None:
        self.counters["frames_kept"] += len(pendings)

    def _lose(self, failed: Appender) -> None:
        """Forget what is not kept, on every disk: a sync that raises has kept nothing it had not before."""
        self._losses += 1
        self._forget()
        self._drained.set()

    def _forget(self) -> None:
        """Drop whatever no sync has confirmed."""
        for sequence, place in self._unconfirmed.items():
            if self._index.holds(place):
                self.counters["frames_lost"] += 1
                self.discard(place)
                self._last_lost = max(self._last_lost, sequence)
        self._unconfirmed.clear()

    def _lose_copies(self, failed: Appender) -> None:
        """What they are copies of is where it was."""
        for pending in failed.unkept():
            pending.alive = False

    def _moved(self, copies: list[Pending]) -> None:
        """The copies are durable: the index points to them from here on."""
        for copy in copies:
            self._index.move(copy)

    def _unreadable(self, segment: Segment, row: int) -> None:
        self.counters["corrupt"] += 1
        self.discard(Place(segment.slots[row], segment.generations[row]))

    def _wake(self) -> None:
        if self._reclaimer is not None:
            self._reclaimer.wake()

    # -- inside: reading ---------------------------------------------------------------------------

    async def _find_oldest(self) -> Oldest:
        """Of what is, or may yet come, to the disks: no other purge is needed than those of it."""
        assert self._opened is not None
        is_unsure = any(disk.unsure for disk in self._opened.disks)
        return await find_oldest(
            self._opened.every.by_number.values(),
            itertools.chain.from_iterable(fresh.unkept() for fresh in self._fresh),
            [0] if is_unsure else self._beginning,
        )

    async def _read(self, place: Place) -> memoryview | None:
        found = self._index.find(place)
        if found is None:
            return None
        nbytes = record_nbytes(found[0].sizes[found[1]])
        await self._reads.enter(nbytes)
        try:
            return await self._read_row(place)
        finally:
            self._reads.leave(nbytes)

    async def _read_row(self, place: Place) -> memoryview | None:
        found = self._index.find(place)  # again: it may have been moved or discarded while we waited
        if found is None or self._opened is None:
            return None
        segment, row = found
        offset, nbytes, sequence = segment.offsets[row], segment.sizes[row], segment.sequences[row]
        files = self._opened.disks[0].files
        segment.readers += 1
        try:
            record, prefix = await self._threads.run(
                lambda: files.read(segment.path, segment.id, offset, nbytes)
            )
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.counters["read_error"] += 1
            return None
        finally:
            segment.readers -= 1
            if segment.is_reclaimable:
                self._wake()
        if prefix is None or prefix.sequence != sequence:
            self.counters["corrupt"] += 1
            return None
        return frame_of(record, nbytes)
