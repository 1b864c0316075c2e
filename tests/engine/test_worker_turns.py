"""Who waits for the worker loop's engine, and in which order: priorities, deadlines, preemption."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from engine.engine_thread import EngineThread
from engine.worker import WorkerLoop
from kvstore.clock import ManualClock
from kvstore.errors import DeadlineExceeded
from tests.engine.fake_engine import FakeEngine, Sink, ask
from tests.role_parts import WAIT_S


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
