"""The worker loop's promises: one thread, in order; no endless wait; a failed step ends only its batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.engine_thread import EngineThread
from engine.types import CompletedBlock, FinishReason, GenerationRequest, StepResult, TailKV, TokenEvent
from engine.worker import WorkerLoop
from kvstore.clock import ManualClock
from kvstore.errors import ConfigError, DeadlineExceeded, OverLimit
from tests.role_parts import WAIT_S, later, request


class FakeEngine:
    """Room for `slots` sequences; each step gives every running one a token. Stands still while `shut`."""

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.sequences: dict[str, GenerationRequest] = {}
        self.given: dict[str, int] = {}
        self.hold: set[str] = set()
        self.parked: set[str] = set()
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.fail_steps = 0
        self.preempt_at: int | None = None  # tokens
        self.refused = threading.Event()
        self.entered = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def can_ever_admit(self, request: GenerationRequest) -> bool:
        return len(request.prompt_ids) < 100

    def blocks_needed(self, request: GenerationRequest, *, hold: bool = False) -> int:
        return 1

    def can_admit(self, request: GenerationRequest, *, hold: bool = False, lent: int = 0) -> bool:
        self._called("can_admit")
        if len(self.sequences) < self.slots:
            return True
        self.refused.set()
        return False

    def admit(
        self,
        request: GenerationRequest,
        *,
        lent: Sequence[int] = (),
        blocks: Sequence[Any] = (),
        tail: TailKV | None = None,
        hold: bool = False,
        keep: bool = False,
        arrival: int | None = None,
    ) -> tuple[int, ...]:
        self._called(f"admit {request.request_id}/{request.attempt}")
        self.entered.set()
        assert self.open.wait(WAIT_S)
        assert request.request_id not in self.sequences, "the earlier attempt must be released first"
        self.sequences[request.request_id] = request
        self.given[request.request_id] = len(request.output_ids)
        if hold:
            self.hold.add(request.request_id)
        return ()

    def slots_lacking(self) -> int:
        return 0

    def step(self) -> StepResult:
        self._called("step")
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("the matrix is singular")
        self.entered.set()
        assert self.open.wait(WAIT_S)
        running = [r for r in self.sequences.values() if r.request_id not in self.parked]
        for wanted in running:
            if self.preempt_at is not None and self.given[wanted.request_id] == self.preempt_at:
                self.preempt_at = None
                del self.sequences[wanted.request_id]
                output = tuple(range(self.given[wanted.request_id]))
                return StepResult(preempted=(replace(wanted, output_ids=output),))
        events = [self._token(request) for request in running]
        payload = np.zeros(8, np.uint8)
        blocks = [CompletedBlock(e.request_id, e.attempt, 1, payload) for e in events if e.index == 1]
        return StepResult(tuple(events), tuple(blocks), len(events))

    def take_tail(self, request_id: str) -> TailKV | None:
        return None

    def release(self, request_id: str) -> None:
        self._called(f"release {request_id}")
        self.sequences.pop(request_id, None)
        self.parked.discard(request_id)

    def has_work(self) -> bool:
        return self.sequences.keys() > self.parked

    def _token(self, request: GenerationRequest) -> TokenEvent:
        index = self.given[request.request_id]
        self.given[request.request_id] += 1
        if request.request_id in self.hold:
            self.parked.add(request.request_id)
        last = index + 1 == request.sampling.max_tokens
        if last:
            del self.sequences[request.request_id]
        finish = FinishReason.LENGTH if last else None
        return TokenEvent(request.request_id, request.attempt, index, index, finish)

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.threads.add(threading.get_ident())


class Sink:
    """Remembers what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.errors: list[Exception] = []
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    def on_block(self, block: CompletedBlock) -> None:
        self.told.append(f"block {block.chain_index}")

    def on_token(self, event: TokenEvent) -> None:
        self.told.append(f"token {event.index}")
        self.began.set()
        if event.finish is not None:
            self.ended.set()

    def on_error(self, error: Exception) -> None:
        self.errors.append(error)
        self.ended.set()

    async def first(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.began.wait()

    async def end(self) -> list[str]:
        async with asyncio.timeout(WAIT_S):
            await self.ended.wait()
        return self.told


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def loop(engine: FakeEngine) -> AsyncIterator[WorkerLoop]:
    loop = WorkerLoop(engine, EngineThread(), waiting_max=2)
    loop.start()
    yield loop
    engine.open.set()
    await loop.close()


def ask(name: str, max_tokens: int = 3, attempt: int = 1) -> GenerationRequest:
    return request((1, 2, 3), name=name, max_tokens=max_tokens, attempt=attempt)


async def test_every_call_of_the_engine_is_made_in_one_thread(loop: WorkerLoop, engine: FakeEngine) -> None:
    sinks = [Sink(), Sink()]
    for i, sink in enumerate(sinks):
        await loop.admit(ask(f"r{i}"), sink, timeout_s=WAIT_S)
    assert await sinks[1].end() == ["token 0", "block 1", "token 1", "token 2"], "blocks before tokens"
    await sinks[0].end()
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads
    assert (loop.held, loop.running) == (0, 0)


async def test_what_does_not_fit_waits_for_room_in_the_order_it_came(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    engine.slots = 1
    names = ["first", "second", "third"]
    sinks = {name: Sink() for name in names}
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*(loop.admit(ask(name), sinks[name], timeout_s=WAIT_S) for name in names[:2]))
        await loop.admit(ask("third"), sinks["third"], timeout_s=WAIT_S)
    for sink in sinks.values():
        await sink.end()
    assert [call for call in engine.calls if call.startswith("admit")] == [f"admit {n}/1" for n in names]


async def test_waiting_is_bounded_in_time_and_in_number(loop: WorkerLoop, engine: FakeEngine) -> None:
    engine.slots = 0
    with pytest.raises(OverLimit, match="no room"):
        await loop.admit(ask("late"), Sink(), timeout_s=0.02)
    waiting = [asyncio.create_task(loop.admit(ask(f"w{i}"), Sink(), timeout_s=WAIT_S)) for i in range(2)]
    await asyncio.wait(waiting, timeout=0.01)
    with pytest.raises(OverLimit, match="wait for this engine already"):
        await loop.admit(ask("too many"), Sink(), timeout_s=WAIT_S)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (loop.waiting, loop.held) == (0, 0)


async def test_what_never_fits_is_told_so_at_once(loop: WorkerLoop) -> None:
    with pytest.raises(ConfigError, match="shorten the prompt"):
        await loop.admit(request((1,) * 100), Sink(), timeout_s=WAIT_S)


async def test_a_failed_step_fails_what_ran_in_it_and_the_loop_goes_on(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    parked, ran, after = Sink(), Sink(), Sink()
    await loop.admit(ask("parked"), parked, timeout_s=WAIT_S, hold=True)
    await parked.first()
    engine.fail_steps = 1
    await loop.admit(ask("ran"), ran, timeout_s=WAIT_S)
    assert await ran.end() == []
    assert str(ran.errors[0]) == "the matrix is singular"
    await loop.admit(ask("after"), after, timeout_s=WAIT_S)
    assert await after.end() == ["token 0", "block 1", "token 1", "token 2"]
    assert loop.counters["engine:failed_steps"] == 1
    assert parked.errors == []
    assert (loop.held, loop.running) == (1, 0)


class BrokenSink(Sink):
    """Fails where it is told to; what it does with an error comes last."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def on_block(self, block: CompletedBlock) -> None:
        super().on_block(block)
        self._break("block")

    def on_token(self, event: TokenEvent) -> None:
        super().on_token(event)
        self._break("token")

    def on_error(self, error: Exception) -> None:
        super().on_error(error)
        raise error

    def _break(self, where: str) -> None:
        if where == self.at:
            raise LookupError(f"no place for a {where}")


@pytest.mark.parametrize("where", ["block", "token", "error"])
async def test_a_sink_that_fails_ends_its_own_sequence_and_the_loop_goes_on(
    loop: WorkerLoop, engine: FakeEngine, where: str
) -> None:
    engine.fail_steps = int(where == "error")
    broken = BrokenSink(where)
    await loop.admit(ask("broken", max_tokens=10**6), broken, timeout_s=WAIT_S)
    await broken.end()
    assert len(broken.told) == {"block": 2, "token": 1, "error": 0}[where], "it hears no more"
    assert isinstance(broken.errors[0], RuntimeError if where == "error" else LookupError)
    after = Sink()
    await loop.admit(ask("after"), after, timeout_s=WAIT_S)
    assert await after.end() == ["token 0", "block 1", "token 1", "token 2"]
    assert loop.counters["engine:failed_sinks"] == 1
    await loop.settled()
    assert (loop.held, engine.sequences) == (0, {})


async def test_a_cancelled_admission_leaves_nothing_in_the_engine(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    engine.open.clear()
    admitting = asyncio.create_task(loop.admit(ask("gone"), Sink(), timeout_s=WAIT_S))
    assert await asyncio.to_thread(engine.entered.wait, WAIT_S)
    admitting.cancel()  # while the thread is inside Engine.admit
    with pytest.raises(asyncio.CancelledError):
        await admitting
    engine.open.set()
    await loop.settled()
    assert engine.sequences == {}
    assert loop.held == 0


async def test_a_newer_attempt_takes_the_place_of_the_older_which_hears_no_more(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    old, new = Sink(), Sink()
    await loop.admit(ask("r", max_tokens=10**6), old, timeout_s=WAIT_S)
    await loop.admit(ask("r", attempt=2), new, timeout_s=WAIT_S)
    told = len(old.told)
    assert await new.end() == ["token 0", "block 1", "token 1", "token 2"]
    assert len(old.told) == told
    loop.release("r", 1)  # the older attempt's owner gives up late: not the newer one's loss
    assert engine.calls.count("release r") == 1


async def test_who_waits_goes_by_priority_then_deadline_then_arrival(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    """Also ahead of one that has its turn already and finds no room."""
    loop._waiting_max = 9
    engine.slots = 0
    urgency = {
        "last": (1, None),
        "third": (0, None),
        "second": (0, 50.0),
        "first": (0, 40.0),
        "zero": (-1, None),
    }
    waiting = []
    for name, (priority, deadline_s) in urgency.items():
        wanted = replace(ask(name), priority=priority, deadline_s=deadline_s)
        waiting.append(asyncio.create_task(loop.admit(wanted, Sink(), timeout_s=WAIT_S)))
        await asyncio.sleep(0)
    assert await asyncio.to_thread(engine.refused.wait, WAIT_S)
    engine.slots = 1
    loop._entrance.freed.set()
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*waiting)
    order = [call for call in engine.calls if call.startswith("admit")]
    assert order == [f"admit {name}/1" for name in ("zero", "first", "second", "third", "last")]


async def test_a_deadline_that_passes_while_waiting_ends_the_request(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    engine.slots = 0
    with pytest.raises(DeadlineExceeded, match=r"deadline of 0\.02 s"):
        await loop.admit(replace(ask("late"), deadline_s=0.02), Sink(), timeout_s=WAIT_S)
    assert (loop.waiting, loop.held) == (0, 0)


async def test_a_deadline_counts_from_the_arrival_and_ends_with_the_first_token(engine: FakeEngine) -> None:
    clock = ManualClock(100.0)
    loop = WorkerLoop(engine, EngineThread(), waiting_max=2, clock=clock)
    late = replace(ask("late"), deadline_s=5.0)
    with pytest.raises(DeadlineExceeded):
        await loop.admit(late, Sink(), timeout_s=WAIT_S, arrived_at=94.0)
    assert engine.calls == []
    await loop.admit(replace(late, output_ids=(7,)), Sink(), timeout_s=WAIT_S, arrived_at=94.0)
    await loop.close()


async def test_a_preempted_sequence_is_admitted_again_and_its_sink_hears_nothing_of_it(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    """Ahead of newcomers; what it computes once more is told once."""
    engine.slots = 1
    sink, newcomer = Sink(), Sink()
    engine.preempt_at = 2
    await loop.admit(ask("r", max_tokens=4), sink, timeout_s=WAIT_S)
    waiting = asyncio.create_task(loop.admit(ask("newcomer"), newcomer, timeout_s=WAIT_S))
    assert await sink.end() == ["token 0", "block 1", "token 1", "token 2", "token 3"]
    await waiting
    assert await newcomer.end() == ["token 0", "block 1", "token 1", "token 2"]
    admitted = [call for call in engine.calls if call.startswith("admit")]
    assert admitted == ["admit r/1", "admit r/1", "admit newcomer/1"]
    assert loop.counters["engine:preempted"] == 1
    assert (loop.held, loop.running) == (0, 0)


async def test_a_preempted_sequence_that_is_given_up_does_not_come_back(
    loop: WorkerLoop, engine: FakeEngine
) -> None:
    engine.slots, engine.preempt_at = 1, 1
    sink = Sink()
    await loop.admit(ask("r", max_tokens=10**6), sink, timeout_s=WAIT_S)
    async with asyncio.timeout(WAIT_S):
        while not loop.counters["engine:preempted"]:  # noqa: ASYNC110
            await asyncio.sleep(0)
    loop.release("r", 1)
    for _ in range(20):
        await asyncio.sleep(0)
    await loop.settled()
    assert engine.sequences == {}
    assert (loop.held, loop.running) == (0, 0)


async def test_release_is_idempotent_and_frees_what_waits(loop: WorkerLoop, engine: FakeEngine) -> None:
    engine.slots = 1
    held, waits = Sink(), Sink()
    await loop.admit(ask("held", max_tokens=10**6), held, timeout_s=WAIT_S, hold=True)
    waiting = asyncio.create_task(loop.admit(later(ask("waits")), waits, timeout_s=WAIT_S))
    assert await asyncio.to_thread(engine.refused.wait, WAIT_S)
    loop.release("held", 1)
    loop.release("held", 1)
    async with asyncio.timeout(WAIT_S):
        await waiting
    await waits.end()
    assert engine.calls.count("release held") == 1
