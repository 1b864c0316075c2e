"""The worker loop: an asynchronous life around a synchronous engine. Prefill and decode both stand on it.

    event loop    admit()  release()  store I/O     sink.on_block / on_token  of each sequence
                     |         |                          ^
    engine thread  [admit] [release] [step] [step] ... one call at a time, in the order they were asked

Every call of the engine runs in one thread of its own, so the engine needs no lock and the event loop goes
on with store I/O while a step computes. A step in progress delays an admission or a release by at most that
step. A step that raises fails the sequences that were running, each through its own sink; the loop goes on.

With an edge shard (engine/edge.py) idle cached blocks make room for an admission, before it is asked whether
it fits, and for a step that would lack slots; a sequence's full blocks are told to its `LocalRun`, and its
slots go back in the order engine, then edge.

Requests wait by priority, deadline and arrival (engine/turns.py). Who is preempted waits again, ahead of
newcomers of its priority, and goes on where it stood: its sink hears nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog

from engine.edge import EdgeShard
from engine.engine_thread import EngineThread, Payload, SequenceSink, SyncEngine
from engine.entrance import Admitted, Entrance
from engine.local_run import LocalRun
from engine.step_gate import StepGate
from engine.turns import urgency_of
from engine.types import CompletedBlock, FinishReason, GenerationRequest, StepResult, TailKV, TokenEvent
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import OverLimit

__all__ = ["WorkerLoop"]

PREEMPTED_TIMEOUT_S: Final = 600.0
"""For a preempted sequence to find room again: as long as those before it may run."""

log = structlog.get_logger(__name__)


class WorkerLoop:
    """Lives on one event loop. `counters` are labelled "engine:..."."""

    def __init__(
        self,
        engine: SyncEngine,
        thread: EngineThread,
        *,
        waiting_max: int,
        edge: EdgeShard | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.waiting = 0
        self._engine = engine
        self._thread = thread
        self._waiting_max = waiting_max
        self._edge = edge
        self._releasing = 0  # releases that the engine has not come to yet: their slots will be free
        self._admitted: dict[str, Admitted] = {}
        self._arrivals = itertools.count()
        self._clock = clock or MonotonicClock()
        self._entrance = Entrance(engine, thread, edge, self._clock, lambda: self._releasing > 0)
        self._work = asyncio.Event()
        self.gate = StepGate()  # held: between two steps, and all that came of the last one is told
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        return sum(admitted.running for admitted in self._admitted.values())

    @property
    def held(self) -> int:
        """Sequences that hold slots of the engine, parked ones included."""
        return len(self._admitted)

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="engine-steps")

    @property
    def changes(self) -> int:
        """How often the weights changed under this loop."""
        return self._entrance.changes

    def weights_changed(self) -> None:
        """While the gate is held. What was read before this, and is not in the engine yet, comes too late."""
        self._entrance.changes += 1
        self._entrance.freed.set()

    def holds(self, request_id: str, attempt: int, *, running: bool = False) -> bool:
        """Is this attempt the loop's? With `running`: and do steps compute it?"""
        admitted = self._admitted.get(request_id)
        ours = admitted if admitted is not None and admitted.attempt == attempt else None
        return ours is not None and (ours.running or not running)

    async def close(self) -> None:
        """Stop stepping and end the engine thread. What is still admitted is dropped with the engine."""
        again = (admitted.again for admitted in self._admitted.values())
        tasks = [task for task in (self._task, *again) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None
        await self._thread.close()

    async def admit(
        self,
        request: GenerationRequest,
        sink: SequenceSink,
        *,
        local: LocalRun | None = None,
        blocks: Sequence[Payload] = (),
        tail: TailKV | None = None,
        hold: bool = False,
        timeout_s: float,
        arrived_at: float | None = None,
        as_of: int | None = None,
    ) -> None:
        """Wait for room, then take the request in; from then on `sink` is told what it yields. `local` is the
        loop's from here on, however this ends; if it was recalled meanwhile, `blocks` and `tail`, which stand
        behind it, are not used either. Its deadline counts from `arrived_at`; None: from now.
        `as_of` are the `changes` that the request was read for.

        Raises WeightsChanged when there were more since, OverLimit when too many wait already or there is no
        room within `timeout_s`, DeadlineExceeded when its own deadline passes before, ConfigError when it
        would not fit an empty engine either, and what Engine.admit raises. Then, and when cancelled, nothing
        is held.
        """
        arrived_at = self._clock.now() if arrived_at is None else arrived_at
        urgency = urgency_of(request, arrived_at, next(self._arrivals))
        record = Admitted(request.attempt, sink, hold, local, urgency, as_of)
        try:
            if self.waiting >= self._waiting_max:
                raise OverLimit(
                    f"{self.waiting} requests wait for this engine already: try another, or later"
                )
            self.waiting += 1
            try:
                take_in = partial(self._take_in, request, record, blocks, tail)
                await self._entrance.enter(request, record, take_in, timeout_s)
            finally:
                self.waiting -= 1
        except BaseException:
            # Unless the engine was asked: then `local` ends behind what the engine does (`_released`).
            if local is not None:
                local.abandon()
            raise

    def release(self, request_id: str, attempt: int) -> None:
        """Free what this attempt holds, after the step that runs. Idempotent; never waits."""
        admitted = self._admitted.get(request_id)
        if admitted is not None and admitted.attempt == attempt:
            del self._admitted[request_id]
            if admitted.again is not None and admitted.again is not asyncio.current_task():
                admitted.again.cancel()
            self._releasing += 1
            released = self._thread.submit(self._engine.release, request_id)
            released.add_done_callback(partial(self._released, admitted.local))

    async def settled(self) -> None:
        """Everything asked of the engine before this call, releases included, is done."""
        await self._thread.submit(lambda: None)

    async def take_tail(self, request_id: str) -> TailKV | None:
        return await self._thread.submit(self._engine.take_tail, request_id)

    # -- admission ---------------------------------------------------------------------------------

    async def _take_in(
        self,
        request: GenerationRequest,
        record: Admitted,
        blocks: Sequence[Payload],
        tail: TailKV | None,
    ) -> bool:
        """False: a step has taken the room since; nothing has changed."""
        await self.gate.opened()
        self._entrance.check_weights(record)
        with self.gate.passing():
            return await self._ask_in(request, record, blocks, tail)

    async def _ask_in(
        self,
        request: GenerationRequest,
        record: Admitted,
        blocks: Sequence[Payload],
        tail: TailKV | None,
    ) -> bool:
        earlier = self._admitted.get(request.request_id)
        if earlier is not None and earlier is not record:
            self.release(request.request_id, earlier.attempt)
        local = record.local
        lent: Sequence[int] = ()
        if local is not None:
            if local.recalled:
                blocks, tail = (), None
            blocks = blocks[local.join(request.tenant, len(blocks)) :]
            local.handed_over = True
            lent = tuple(local.slots)
        if record.again is None:
            record.next_block = len(lent) + len(blocks)
        self._admitted[request.request_id] = record
        admit = partial(
            self._engine.admit, request, lent=lent, blocks=blocks, tail=tail, hold=record.hold,
            keep=local is not None, arrival=record.urgency.arrival,
        )  # fmt: skip
        try:
            slots = await self._thread.submit(
                _admit_if_it_fits, self._engine, admit, request, record.hold, len(lent)
            )
        except BaseException:
            # Cancelled while the thread was in admit: the release queued here runs after it.
            self.release(request.request_id, request.attempt)
            raise
        if slots is None:
            if local is not None:
                local.handed_over = False
            if record.again is None and self._admitted.get(request.request_id) is record:
                del self._admitted[request.request_id]
            return False
        if local is not None:
            local.admitted(slots)
        record.running = True
        self._work.set()
        return True

    def _released(self, local: LocalRun | None, future: asyncio.Future[None]) -> None:
        self._releasing -= 1
        self._entrance.freed.set()
        if local is not None:
            local.end()
        if not future.cancelled() and (error := future.exception()) is not None:
            self.counters["engine:failed_releases"] += 1
            log.error("the engine failed to release a sequence", exc_info=error)

    # -- stepping ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._work.clear()
            await self.gate.opened()
            with self.gate.passing():
                try:
                    result = await self._step()
                except Exception as error:
                    self._fail_running(error)
                    result = None
                if result is not None:
                    self._dispatch(result)
            if result is None:
                await self._work.wait()

    async def _step(self) -> StepResult | None:
        """None: there was nothing to do."""
        result = await self._thread.submit(_step_if_it_fits, self._engine, self._edge is not None)
        if isinstance(result, int) and self._edge is not None:
            self._edge.give_room(result, self._entrance.entering)
            return await self._thread.submit(self._engine.step)
        return result if isinstance(result, StepResult) else None

    def _dispatch(self, result: StepResult) -> None:
        """Blocks before a sequence's last event, which so finds all of them handed over, and behind those
        that tell the tokens in them."""
        self.counters["engine:steps"] += 1
        self.counters["engine:tokens_computed"] += result.tokens_computed
        self.counters["engine:drafts_proposed"] += result.drafts_proposed
        self.counters["engine:drafts_accepted"] += result.drafts_accepted
        last = {event.request_id: event for event in result.events}
        for event in result.events:
            if event is not last[event.request_id]:
                self._dispatch_event(event)
        for block in result.blocks:
            if (admitted := self._current(block)) is not None:
                ending = last.get(block.request_id)
                keep = ending is None or ending.finish is not FinishReason.ERROR
                self._tell(block.request_id, admitted, partial(_take_block, admitted, block, keep))
        for event in last.values():
            self._dispatch_event(event)
        for request in result.preempted:
            if (admitted := self._current(request)) is not None:
                self._wait_again(request, admitted)

    def _dispatch_event(self, event: TokenEvent) -> None:
        if (admitted := self._current(event)) is None:
            return
        if event.finish is not None or admitted.hold:
            admitted.running = False
        if event.finish is not None and not admitted.hold:
            self._ended(event.request_id, admitted)
        self._tell(event.request_id, admitted, partial(admitted.sink.on_token, event))

    def _wait_again(self, request: GenerationRequest, admitted: Admitted) -> None:
        """It has left the engine. Its full blocks lie idle in the edge shard until somebody needs them."""
        self.counters["engine:preempted"] += 1
        admitted.running = False
        if admitted.local is not None:
            admitted.local.end()
        deadline_at = math.inf if request.output_ids else admitted.urgency.deadline_at
        admitted.urgency = admitted.urgency._replace(newcomer=False, deadline_at=deadline_at)
        again = self._admit_again(request, admitted)
        admitted.again = asyncio.create_task(again, name=f"admit {request.request_id} again")
        self._entrance.freed.set()

    async def _admit_again(self, request: GenerationRequest, admitted: Admitted) -> None:
        try:
            take_in = partial(self._take_in, request, admitted, (), None)
            await self._entrance.enter(request, admitted, take_in, PREEMPTED_TIMEOUT_S)
        except Exception as error:
            self.release(request.request_id, request.attempt)
            self._tell(request.request_id, admitted, partial(admitted.sink.on_error, error))

    def _ended(self, request_id: str, admitted: Admitted) -> None:
        if admitted.local is not None:
            self.release(request_id, admitted.attempt)  # the engine has kept its slots for that
        else:
            del self._admitted[request_id]  # the engine has released it
            self._entrance.freed.set()

    def _tell(self, request_id: str, admitted: Admitted, tell: Callable[[], None]) -> None:
        """A sink that raises is its own sequence's end, and nobody else's."""
        try:
            tell()
        except Exception as error:
            self.counters["engine:failed_sinks"] += 1
            log.exception("what a sequence yields could not be told", request=request_id)
            self.release(request_id, admitted.attempt)
            with contextlib.suppress(Exception):  # told twice that it failed, it can do no more
                admitted.sink.on_error(error)

    def _current(self, told: CompletedBlock | TokenEvent | GenerationRequest) -> Admitted | None:
        """Who the news is for; None when its attempt was released or superseded while the step ran."""
        admitted = self._admitted.get(told.request_id)
        return admitted if admitted is not None and admitted.attempt == told.attempt else None

    def _fail_running(self, error: Exception) -> None:
        """A batch is one computation: all that ran in it have no next token. Parked ones are untouched."""
        self.counters["engine:failed_steps"] += 1
        log.error("an engine step failed", running=self.running, exc_info=error)
        for request_id, admitted in [*self._admitted.items()]:
            if admitted.running:
                self.release(request_id, admitted.attempt)
                self._tell(request_id, admitted, partial(admitted.sink.on_error, error))
        # Releases are queued; look for work again behind them, so that a request that came meanwhile runs.
        self._work.set()


def _take_block(admitted: Admitted, block: CompletedBlock, keep: bool) -> None:
    """What is computed once more after a preemption may stay here, and was told before."""
    if admitted.local is not None and keep:
        admitted.local.filled(block.chain_index, block.slot)
    if block.chain_index >= admitted.next_block:
        admitted.next_block = block.chain_index + 1
        admitted.sink.on_block(block)


def _admit_if_it_fits(
    engine: SyncEngine,
    admit: Callable[[], tuple[int, ...]],
    request: GenerationRequest,
    hold: bool,
    lent: int,
) -> tuple[int, ...] | None:
    """In the engine thread: a step may have taken what was free when it was asked before."""
    return admit() if engine.can_admit(request, hold=hold, lent=lent) else None


def _step_if_it_fits(engine: SyncEngine, may_make_room: bool) -> StepResult | int | None:
    """In the engine thread. A number: it lacks so many slots, and nothing was done."""
    if not engine.has_work():
        return None
    lacking = engine.slots_lacking() if may_make_room else 0
    return lacking or engine.step()
