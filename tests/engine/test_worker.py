"""The worker loop's promises: one thread, in order; no endless wait; a failed step ends only its batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from engine.engine_thread import EngineThread
from engine.types import CompletedBlock, FinishReason, StepResult, TokenEvent
from engine.worker import WorkerLoop
from kvstore.errors import ConfigError, OverLimit
from tests.engine.fake_engine import FakeEngine, Sink, ask
from tests.role_parts import WAIT_S, later, request


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


async def test_every_call_of_the_engine_is_made_in_one_thread(loop: WorkerLoop, engine: FakeEngine) -> None:
    sinks = [Sink(), Sink()]
    for i, sink in enumerate(sinks):
        await loop.admit(ask(f"r{i}"), sink, timeout_s=WAIT_S)
    assert await sinks[1].end() == ["token 0", "block 1", "token 1", "token 2"], "blocks before tokens"
    await sinks[0].end()
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads
    assert (loop.held, loop.running) == (0, 0)


async def test_a_block_comes_behind_the_tokens_in_it_and_before_its_sequences_last(
    loop: WorkerLoop, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with accepted drafts: three tokens at once, and the block that the first two fill."""

    def step() -> StepResult:
        del engine.sequences["r"]
        finishes = (None, None, FinishReason.LENGTH)
        events = [TokenEvent("r", 1, index, index, finish) for index, finish in enumerate(finishes)]
        block = CompletedBlock("r", 1, 0, np.zeros(8, np.uint8))
        return StepResult(tuple(events), (block,), 3, drafts_proposed=5, drafts_accepted=2)

    monkeypatch.setattr(engine, "step", step)
    sink = Sink()
    await loop.admit(ask("r"), sink, timeout_s=WAIT_S)
    assert await sink.end() == ["token 0", "token 1", "block 0", "token 2"]
    assert (loop.counters["engine:drafts_proposed"], loop.counters["engine:drafts_accepted"]) == (5, 2)
    assert loop.held == 0


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
