"""Performs the moves between tiers that the core names: bytes are read, checked, encoded, written, synced.

One task beside the others, woken when something may have to move. What is read for a move is verified first:
a byte that went wrong on one tier is never carried to the next, its version is retired instead. A frame is
written below only while its version is live, and takes its place in the durable order in the same turn of
the loop: a purge that comes later finds it. Bounds: `batch_nbytes` of each direction under way, an eighth of
the host at most, one sync a batch, and nobody else syncs: what a failed sync forgets is this batch. A disk
that fails costs the moves of its batch, and nothing moves for RETRY_S; a frame that cannot be read, or that
no segment has room for (EFBIG), costs its own move.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from kvstore.arrival import is_frame_of
from kvstore.clock import Clock
from kvstore.core.moves import STEPS_A_CALL, Move
from kvstore.core.shard import ShardCore
from kvstore.nouns import BlockRef, KVLayout, Tier
from kvstore.rates import Rate
from kvstore.tiers.base import TierStorage, place_of
from kvstore.tiers.copying import beside_the_loop, fill, to_its_end
from kvstore.tiers.durable import DurableTier
from kvstore.tiers.hierarchy import Tiers

log = structlog.get_logger(__name__)

BATCH_NBYTES: Final = 32 << 20
HOST_SHARE: Final = 8
SLICES_A_BATCH: Final = 256  # of starting, before what was started is performed
RETRY_S: Final = 1.0

EncodeFrame = Callable[[memoryview, KVLayout], memoryview | None]
"""The frame that the tier below keeps of a lossless one; None: these values cannot be encoded."""


class Mover:
    def __init__(
        self,
        core: ShardCore,
        tiers: Tiers,
        durable: DurableTier,
        clock: Clock,
        settle: Callable[[], None],
        encode: EncodeFrame | None = None,
        batch_nbytes: int = BATCH_NBYTES,
    ) -> None:
        """`settle` is called after whatever may have freed slots, in the same turn of the loop."""
        self._core = core
        self._tiers = tiers
        self._durable = durable
        self._clock = clock
        self._settle = settle
        self._encode = encode
        # What is pinned for a move makes no room for writers: never more than a small share of the host.
        self._batch_nbytes = min(batch_nbytes, core.config.capacity_nbytes // HOST_SHARE)
        self._wanted = asyncio.Event()
        self._moved = asyncio.Condition()
        self.promoted = Rate()  # bytes, while there was anything to bring up
        self._not_before = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"mover-{self._core.config.shard}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def wake(self) -> None:
        """Something was let go of, matched or announced: there may be something to move."""
        self._wanted.set()

    async def step(self) -> bool:
        """Start what is to move, in slices between which others have their turn, and see it to its end.
        Is there more to do at once?"""
        if self._clock.now() < self._not_before:
            return False
        open_moves: dict[Move, None] = {}  # in their order
        try:
            is_cut_short = await self._start(open_moves)
            if began := bool(open_moves):
                await self._perform(open_moves)
        finally:  # cancelled or not: no move stays under way
            for move in open_moves:
                self._core.moves.failed(move)
            if open_moves:
                self._settle()
        async with self._moved:
            self._moved.notify_all()
        return began or is_cut_short

    async def wait_for(self, refs: Sequence[BlockRef], timeout_s: float) -> None:
        """Until none of these is on its way to the host any more, or the time is over."""
        table, moves = self._core.index.versions, self._core.moves

        def settled() -> bool:
            return not any(table.is_current(r.slot, r.generation) and moves.is_coming(r.slot) for r in refs)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._moved:
                await self._moved.wait_for(settled)

    # -- inside ------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                while await self.step():
                    pass
            except Exception:  # whatever failed, the next block may be moved
                self._not_before = self._clock.now() + RETRY_S
                self._core.counters["mover_failed"] += 1
                log.exception("a batch of moves failed, and the mover goes on", shard=self._core.config.shard)

    async def _start(self, open_moves: dict[Move, None]) -> bool:
        """Is there more to start, of which this batch has no room or no time?"""
        for _ in range(SLICES_A_BATCH):
            open_moves |= dict.fromkeys(self._core.moves.start(self._clock.now(), self._batch_nbytes))
            self._settle()
            self._wanted.clear()  # what is wanted still could not be started now: to have settled is no news
            if not self._core.moves.is_cut_short:
                return False
            await asyncio.sleep(0)
        return True

    async def _perform(self, open_moves: dict[Move, None]) -> None:
        up = [move for move in open_moves if move.to is Tier.HOST]
        down = [move for move in open_moves if move.to is Tier.NVME]
        await self._promote(up, open_moves)
        await self._demote(down, open_moves)

    async def _promote(self, moves: Sequence[Move], open_moves: dict[Move, None]) -> None:
        began, nbytes = self._clock.now(), 0
        for move in moves:
            try:
                frame = await self._checked(move)
                if frame is None:
                    continue
                nbytes += frame.nbytes
                room = await self._copied(frame, self._tiers.host)
                if not self._core.moves.is_wanted(move):
                    self._tiers.host.give_up(room)
                    continue
                await self._tiers.host.write(place_of(move.target.ref), room)
            except OSError as error:
                self._failed("host", error)
            else:
                self._end(move, open_moves)
        self.promoted.measured(nbytes, self._clock.now() - began)

    async def _demote(self, moves: Sequence[Move], open_moves: dict[Move, None]) -> None:
        """Queue the frames, sync once, then tell the core of all: before, none of them is there."""
        queued: list[Move] = []
        unread = 0
        try:
            for move in moves:
                unread += not await self._queue(move, queued)
            if queued:
                await self._durable.sync()
        except OSError as error:
            self._not_before = self._clock.now() + RETRY_S
            self._failed("nvme", error)
            for move in queued:
                self._durable.discard(place_of(move.target.ref))
            if error.errno == errno.ENOSPC:
                await self._give_up_below(sum(move.target.nbytes for move in moves))
            return
        if unread and not queued:  # else who cannot be read and is always next to go is tried without end
            self._not_before = self._clock.now() + RETRY_S
        for move in queued:
            self._end(move, open_moves)

    async def _queue(self, move: Move, queued: list[Move]) -> bool:
        """Write its frame, unless it has none for the tier below. False: it could not be read or copied.

        Raises OSError for what concerns the disk and not this frame alone.
        """
        try:
            frame = await self._made(move)
        except OSError as error:
            self._failed("source", error)
            return False
        if frame is None:
            return True
        if not self._core.moves.is_wanted(move):
            self._durable.give_up(frame)
            return True
        queued.append(move)
        try:
            await self._durable.write(place_of(move.target.ref), frame)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            queued.remove(move)
            self._failed("nvme", error)
            self._core.moves.unfit(move)
        return True

    async def _give_up_below(self, nbytes: int) -> None:
        """The disk is full before it holds what the tier said: make the room that this batch lacked."""
        for _ in range(SLICES_A_BATCH):
            went = self._core.room_below.give_up(nbytes, STEPS_A_CALL)
            self._settle()
            nbytes -= went
            if not went or nbytes <= 0:
                return
            await asyncio.sleep(0)

    def _end(self, move: Move, open_moves: dict[Move, None]) -> None:
        del open_moves[move]
        place = place_of(move.target.ref)
        if not self._core.moves.done(move):
            (self._tiers.host if move.to is Tier.HOST else self._durable).discard(place)
        elif move.is_encoded:
            self._tiers.host.leave(place)
        self._settle()

    async def _made(self, move: Move) -> memoryview | None:
        """The frame that goes below, in memory of that tier's own."""
        frame = await self._checked(move)
        if frame is None or not move.is_encoded:
            return None if frame is None else await self._copied(frame, self._durable)
        assert self._encode is not None, "the core names encoded versions, and nobody encodes"
        encode, layout = self._encode, self._core.namespace(move.source.namespace).layout
        try:
            made = await beside_the_loop(frame.nbytes, lambda: encode(frame, layout))
        finally:
            self._tiers.give_back(frame)
        if made is not None and made.nbytes != move.target.nbytes:
            sizes = {"made": made.nbytes, "promised": move.target.nbytes}
            log.error("a codec does not keep to its size", shard=self._core.config.shard, **sizes)
            self._durable.give_up(made)
            made = None
        if made is None:
            self._core.counters["not_encodable"] += 1
            self._core.moves.unfit(move)
        return made

    def _failed(self, to: str, error: OSError) -> None:
        self._core.counters[f"{to}_failed:{error.errno}"] += 1
        log.warning("a move failed", shard=self._core.config.shard, to=to, why=str(error))

    async def _copied(self, frame: memoryview, storage: TierStorage) -> memoryview:
        """In memory of the storage's own. Gives the borrowed frame back."""
        room = storage.allocate(frame.nbytes)
        try:
            await to_its_end(frame.nbytes, lambda: fill(room, frame), lambda: storage.give_up(room))
        finally:
            self._tiers.give_back(frame)
        return room

    async def _checked(self, move: Move) -> memoryview | None:
        """The source's frame, borrowed, if it is what it says. What is lost or broken is retired."""
        frame = await self._tiers.borrow(place_of(move.source.ref))
        if frame is not None:
            intact = False
            expected = move.source.meta(self._core.namespace(move.source.namespace).layout.fingerprint)
            try:
                intact = await beside_the_loop(frame.nbytes, lambda: is_frame_of(frame, expected))
            finally:
                if not intact:
                    self._tiers.give_back(frame)
            if intact:
                return frame
        if self._core.moves.is_wanted(move):
            self._core.counters["moves_of_broken"] += 1
            self._core.report(move.source)
            self._settle()
        return None
