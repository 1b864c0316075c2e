"""The worker loop: an asynchronous life around a synchronous engine. Prefill and decode both stand on it.

    event loop    admit()  release()  store I/O     sink.on_block / on_token  of each sequence
                     |         |                          ^
    engine thread  [admit] [release] [step] [step] ... one call at a time, in the order they were asked

Every call of the engine runs in one thread of its own, so the engine needs no lock and the event loop goes
on with store I/O while a step computes. A step in progress delays an admission or a release by at most that
step. A step that raises fails the sequences that were running, each through its own sink; the loop goes on.

With an edge shard (engine/edge.py) idle cached blocks make room for an admission, before it is asked whether
it fits; a sequence's full blocks are told to its `LocalRun`, and its slots go back in the order engine, then
edge.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from engine.edge import EdgeShard
from engine.local_run import LocalRun
from engine.types import CompletedBlock, FinishReason, GenerationRequest, StepResult, TailKV, TokenEvent
from kvstore.errors import ConfigError, OverLimit

__all__ = ["EngineThread", "SequenceSink", "SyncEngine", "WorkerLoop"]

P = ParamSpec("P")
T = TypeVar("T")
Payload = memoryview | npt.NDArray[np.uint8]

PEERS_LEASE_LOOK_S: Final = 0.25
"""Between two looks for room while blocks of the pool may be pinned by other workers: nobody tells when they
end."""

log = structlog.get_logger(__name__)


class SyncEngine(Protocol):
    """What the loop asks of `engine.Engine`, from the engine thread unless it says otherwise."""

    def can_ever_admit(self, request: GenerationRequest) -> bool: ...

    def can_admit(self, request: GenerationRequest, *, hold: bool = False, lent: int = 0) -> bool: ...

    def blocks_needed(self, request: GenerationRequest, *, hold: bool = False) -> int:
        """From any thread."""
        ...

    def admit(
        self,
        request: GenerationRequest,
        *,
        lent: Sequence[int] = (),
        blocks: Sequence[Payload] = (),
        tail: TailKV | None = None,
        hold: bool = False,
        keep: bool = False,
    ) -> tuple[int, ...]: ...

    def step(self) -> StepResult: ...

    def take_tail(self, request_id: str) -> TailKV | None: ...

    def release(self, request_id: str) -> None: ...

    def has_work(self) -> bool: ...


class SequenceSink(Protocol):
    """Who wants what a sequence yields. Called on the event loop; must neither wait nor raise."""

    def on_block(self, block: CompletedBlock) -> None:
        """A block became full. Its tokens were all told by earlier events, or came with the request."""
        ...

    def on_token(self, event: TokenEvent) -> None: ...

    def on_error(self, error: Exception) -> None:
        """The engine failed on it; it is already released."""
        ...


class EngineThread:
    """The one thread that loads and runs an engine. Calls run one by one, in the order they are asked."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Queue the call at once, before this returns; the future is the event loop's."""
        return asyncio.wrap_future(self._executor.submit(call, *args, **kwargs))

    async def close(self) -> None:
        """Waits for the call that runs; those that wait are dropped."""
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)


@dataclass(slots=True)
class _Admitted:
    attempt: int
    sink: SequenceSink
    hold: bool
    local: LocalRun | None
    running: bool = False  # steps compute it: in the engine, and neither ended nor parked


class WorkerLoop:
    """Lives on one event loop. `counters` are labelled "engine:..."."""

    def __init__(
        self, engine: SyncEngine, thread: EngineThread, *, waiting_max: int, edge: EdgeShard | None = None
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.waiting = 0
        self._engine = engine
        self._thread = thread
        self._waiting_max = waiting_max
        self._edge = edge
        self._releasing = 0  # releases that the engine has not come to yet: their slots will be free
        self._admitted: dict[str, _Admitted] = {}
        self._turn = asyncio.Lock()  # admissions go in the order they came
        self._work = asyncio.Event()
        self._freed = asyncio.Event()
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

    async def close(self) -> None:
        """Stop stepping and end the engine thread. What is still admitted is dropped with the engine."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
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
    ) -> None:
        """Wait for room, then take the request in; from then on `sink` is told what it yields. `local` is the
        loop's from here on, however this ends; if it was recalled meanwhile, `blocks` and `tail`, which stand
        behind it, are not used either.

        Raises OverLimit when too many wait already or there is no room within `timeout_s`, ConfigError when
        it would not fit an empty engine either, and what Engine.admit raises. Then, and when cancelled,
        nothing is held.
        """
        try:
            await self._admit(request, sink, local, blocks, tail, hold, timeout_s)
        except BaseException:
            # Unless the engine was asked: then `local` ends behind what the engine does (`_released`).
            if local is not None:
                local.abandon()
            raise

    async def _admit(
        self,
        request: GenerationRequest,
        sink: SequenceSink,
        local: LocalRun | None,
        blocks: Sequence[Payload],
        tail: TailKV | None,
        hold: bool,
        timeout_s: float,
    ) -> None:
        if self.waiting >= self._waiting_max:
            raise OverLimit(f"{self.waiting} requests wait for this engine already: try another, or later")
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s), self._turn:
                with self._edge.admission() if self._edge is not None else contextlib.nullcontext():
                    await self._wait_for_room(request, local, hold)
                    await self._take_in(request, sink, local, blocks, tail, hold)
        except TimeoutError:
            raise OverLimit(
                f"request {request.request_id} found no room in this engine within {timeout_s:.1f} s"
            ) from None
        finally:
            self.waiting -= 1

    def release(self, request_id: str, attempt: int) -> None:
        """Free what this attempt holds, after the step that runs. Idempotent; never waits."""
        admitted = self._admitted.get(request_id)
        if admitted is not None and admitted.attempt == attempt:
            del self._admitted[request_id]
            self._releasing += 1
            released = self._thread.submit(self._engine.release, request_id)
            released.add_done_callback(partial(self._released, admitted.local))

    async def settled(self) -> None:
        """Everything asked of the engine before this call, releases included, is done."""
        await self._thread.submit(lambda: None)

    async def take_tail(self, request_id: str) -> TailKV | None:
        return await self._thread.submit(self._engine.take_tail, request_id)

    # -- admission ---------------------------------------------------------------------------------

    async def _wait_for_room(self, request: GenerationRequest, local: LocalRun | None, hold: bool) -> None:
        if not await self._thread.submit(self._engine.can_ever_admit, request):
            raise ConfigError(
                f"request {request.request_id} of {len(request.prompt_ids)} prompt tokens and max_tokens "
                f"{request.sampling.max_tokens} does not fit this engine even when it is empty: shorten "
                "the prompt, lower max_tokens, or raise engine.pool_nbytes or engine.max_model_len"
            )
        while True:
            self._freed.clear()  # before asking: what is freed meanwhile must not be missed
            if not self._releasing:
                self._make_room(request, local, hold)
            lent = 0 if local is None else len(local.slots)
            if await self._thread.submit(self._engine.can_admit, request, hold=hold, lent=lent):
                return
            if self._releasing or not self._make_room(request, local, hold):
                await self._some_room()

    def _make_room(self, request: GenerationRequest, local: LocalRun | None, hold: bool) -> bool:
        """Idle blocks of the cache go, as many as are needed and if they are enough. Did anything change?"""
        if self._edge is None:
            return False
        lent = 0 if local is None else len(local.slots)
        return self._edge.make_room(self._engine.blocks_needed(request, hold=hold) - lent, local)

    async def _some_room(self) -> None:
        if self._edge is None:
            await self._freed.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PEERS_LEASE_LOOK_S):
                await self._freed.wait()

    async def _take_in(
        self,
        request: GenerationRequest,
        sink: SequenceSink,
        local: LocalRun | None,
        blocks: Sequence[Payload],
        tail: TailKV | None,
        hold: bool,
    ) -> None:
        earlier = self._admitted.get(request.request_id)
        if earlier is not None:
            self.release(request.request_id, earlier.attempt)
        lent: Sequence[int] = ()
        if local is not None:
            local.handed_over = True
            lent = tuple(local.slots)
            if local.recalled:
                blocks, tail = (), None
        admitted = self._admitted[request.request_id] = _Admitted(request.attempt, sink, hold, local)
        try:
            slots = await self._thread.submit(
                self._engine.admit,
                request,
                lent=lent,
                blocks=blocks,
                tail=tail,
                hold=hold,
                keep=local is not None,
            )
            if local is not None:
                local.admitted(slots)
        except BaseException:
            # Cancelled while the thread was in admit: the release queued here runs after it.
            self.release(request.request_id, request.attempt)
            raise
        admitted.running = True
        self._work.set()

    def _released(self, local: LocalRun | None, future: asyncio.Future[None]) -> None:
        self._releasing -= 1
        self._freed.set()
        if local is not None:
            local.end()
        if not future.cancelled() and (error := future.exception()) is not None:
            self.counters["engine:failed_releases"] += 1
            log.error("the engine failed to release a sequence", exc_info=error)

    # -- stepping ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._work.clear()
            try:
                result = await self._thread.submit(self._step)
            except Exception as error:
                self._fail_running(error)
                result = None
            if result is None:
                await self._work.wait()
            else:
                self._dispatch(result)

    def _step(self) -> StepResult | None:
        """In the engine thread. None: there was nothing to do."""
        return self._engine.step() if self._engine.has_work() else None

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

    def _dispatch_event(self, event: TokenEvent) -> None:
        if (admitted := self._current(event)) is None:
            return
        if event.finish is not None or admitted.hold:
            admitted.running = False
        if event.finish is not None and not admitted.hold:
            self._ended(event.request_id, admitted)
        self._tell(event.request_id, admitted, partial(admitted.sink.on_token, event))

    def _ended(self, request_id: str, admitted: _Admitted) -> None:
        if admitted.local is not None:
            self.release(request_id, admitted.attempt)  # the engine has kept its slots for that
        else:
            del self._admitted[request_id]  # the engine has released it
            self._freed.set()

    def _tell(self, request_id: str, admitted: _Admitted, tell: Callable[[], None]) -> None:
        """A sink that raises is its own sequence's end, and nobody else's."""
        try:
            tell()
        except Exception as error:
            self.counters["engine:failed_sinks"] += 1
            log.exception("what a sequence yields could not be told", request=request_id)
            self.release(request_id, admitted.attempt)
            with contextlib.suppress(Exception):  # told twice that it failed, it can do no more
                admitted.sink.on_error(error)

    def _current(self, told: CompletedBlock | TokenEvent) -> _Admitted | None:
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


def _take_block(admitted: _Admitted, block: CompletedBlock, keep: bool) -> None:
    if admitted.local is not None and keep:
        admitted.local.filled(block.chain_index)
    admitted.sink.on_block(block)
