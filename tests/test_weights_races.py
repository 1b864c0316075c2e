"""Weights that change in the very turn in which something begins: promise 3 between two turns of a loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engine import updating
from engine.boot import Worker
from engine.engine import Engine
from engine.types import FirstToken, UpdateMode
from engine.updating import LoadedWeights
from kvstore.errors import EpochConflict, OverLimit, Unavailable
from kvstore.nouns import Epoch, EpochsOfModel, WeightsDigest
from tests.role_parts import WAIT_S, prompt, request
from tests.tiny_model import make_tiny_model
from tests.weights_parts import (
    Oracle,
    assert_drawn_by_fresh_engines,
    inspect,
    prepare_both,
    settled,
    stores_of,
    under_load,
)

T = TypeVar("T")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    root = tmp_path_factory.mktemp("epochs")
    return Oracle([make_tiny_model(root / str(seed), seed) for seed in range(3)])


def begun_at_the_swap(
    worker: Worker, begin: Callable[[], Coroutine[Any, Any, T]], delay: int
) -> asyncio.Future[asyncio.Task[T]]:
    """What is begun `delay` turns of the event loop after the engine thread has swapped its weights."""
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[asyncio.Task[T]] = loop.create_future()

    def later(turns: int) -> None:
        if turns:
            loop.call_soon(later, turns - 1)
        else:
            begun.set_result(loop.create_task(begin()))

    engine = worker.weights._engine
    swap = engine.swap_weights

    def swap_and_begin(loaded: LoadedWeights) -> None:
        swap(loaded)
        loop.call_soon_threadsafe(later, delay)

    engine.swap_weights = swap_and_begin  # type: ignore[method-assign]
    return begun


@pytest.mark.parametrize("delay", range(6))
async def test_a_prompt_enlisted_before_the_change_is_computed_as_one_of_the_new_epoch(
    oracle: Oracle, delay: int
) -> None:
    async with under_load(oracle) as load:
        await prepare_both(load, oracle, 2)
        prefill, worker = load.pair.prefill, load.pair.workers[0]
        asked = request(prompt(21), name="r", max_tokens=24)
        beginning = begun_at_the_swap(worker, lambda: prefill.prefill(asked), delay)
        await prefill.update_weights(oracle.path(2), 2, UpdateMode.RECOMPUTE, WAIT_S)
        first: FirstToken = await (await beginning)
        assert first.epoch == Epoch(2, oracle.engine(2).weights_digest)
        assert_drawn_by_fresh_engines(oracle, asked, [first.event])
        handoff = await prefill.handoff("r", 1)
        assert handoff is not None
        assert (handoff.epoch, handoff.foreign) == (first.epoch, False)
        worker.store.release_for("default", handoff.leases)
        await settled(load.pair)
        seen = await inspect(oracle, stores_of(load.pair), [(*asked.prompt_ids, first.event.token_id)])
        assert set(seen) == {2}
        await load.pair.assert_nothing_held()


@pytest.mark.parametrize("delay", range(4))
async def test_drain_never_mixes(oracle: Oracle, delay: int) -> None:
    """A handoff that comes while decode's engine swaps: it is of weights that have ended, and is refused. Its
    leases are given back."""
    async with under_load(oracle) as load:
        await prepare_both(load, oracle, 2)
        asked = request(prompt(19), name="r", max_tokens=12)
        await load.pair.prefill.prefill(asked)
        handoff = await load.pair.prefill.handoff("r", 1)
        assert handoff is not None
        decode, worker = load.pair.decode, load.pair.workers[1]
        beginning = begun_at_the_swap(worker, lambda: decode.start(handoff), delay)
        await decode.update_weights(oracle.path(2), 2, UpdateMode.DRAIN, WAIT_S)
        with pytest.raises(EpochConflict, match="of epoch 1, this worker"):
            await (await beginning)
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_starts_that_wait_for_a_change_are_bounded_and_may_be_cancelled(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        decode, worker = load.pair.decode, load.pair.workers[1]
        handoffs = []
        for name in ("a", "b"):
            await load.pair.prefill.prefill(request(prompt(19), name=name, max_tokens=12))
            handoff = await load.pair.prefill.handoff(name, 1)
            assert handoff is not None
            handoffs.append(handoff)
        decode._limits = decode._limits.model_copy(update={"requests_max": 1})
        async with worker.loop.gate.held():
            waiting = asyncio.create_task(decode.start(handoffs[0]))
            await asyncio.sleep(0)
            with pytest.raises(OverLimit, match="wait here for other weights"):
                await decode.start(handoffs[1])
            assert not waiting.done()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_a_failed_prepare_leaves_the_number_free(oracle: Oracle) -> None:
    """This worker could, another could not: what remains is nothing, here or in the store."""
    async with under_load(oracle) as load:
        prefill, worker = load.pair.prefill, load.pair.workers[0]
        await prefill.prefill(request(prompt(9), name="warm", max_tokens=2))
        await prefill.abort("warm", 1)
        await prefill.prepare_weights(oracle.path(2), 2)
        assert worker.edge is not None
        for driver in (*load.pair.shards, worker.edge.driver):
            known = await driver.epochs("tiny", timeout_s=WAIT_S)
            assert [epoch.number for epoch in known.registered] == [1]
        await prefill.discard_weights()
        other = Epoch(2, oracle.engine(3).weights_digest)
        assert await prefill.prepare_weights(oracle.path(3), 2) == other
        assert (await prefill.update_weights(oracle.path(3), 2, UpdateMode.DRAIN, WAIT_S)).epoch_number == 2
        for driver in (*load.pair.shards, worker.edge.driver):
            assert (await driver.epochs("tiny", timeout_s=WAIT_S)).registered[1] == other
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_prepare_refuses_a_number_that_a_shard_knows_as_other_weights(oracle: Oracle) -> None:
    """Also where another shard is away: no worker changes then. A pool that knows it refuses as well."""
    async with under_load(oracle) as load:
        prefill, worker = load.pair.prefill, load.pair.workers[0]
        await prefill.prefill(request(prompt(9), name="warm", max_tokens=2))
        await prefill.abort("warm", 1)
        other = Epoch(5, WeightsDigest(b"other weights..."))
        await load.pair.shards[1].register_epoch("tiny", other, timeout_s=WAIT_S)
        load.pair.shards[0].epochs = _away  # type: ignore[method-assign]
        with pytest.raises(EpochConflict, match="on shard s1"):
            await prefill.prepare_weights(oracle.path(2), 5)
        assert worker.edge is not None
        worker.edge.know(Epoch(6, other.weights_digest))
        with pytest.raises(EpochConflict, match="is bound to weights"):
            await prefill.prepare_weights(oracle.path(2), 6)
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_discard_while_preparing(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked gave up: nothing is held when it is loaded."""
    async with under_load(oracle) as load:
        prefill, worker = load.pair.prefill, load.pair.workers[0]
        loading, go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(updating, "load_beside", _when_told(updating.load_beside, loading, go_on))
        preparing = asyncio.create_task(prefill.prepare_weights(oracle.path(2), 2))
        assert await asyncio.to_thread(loading.wait, WAIT_S)
        await prefill.discard_weights()
        go_on.set()
        assert (await preparing).number == 2
        assert worker.weights._prepared is None
        await prefill.prepare_weights(oracle.path(2), 2)
        assert worker.weights._prepared is not None, "an earlier discard is not a later one"


@pytest.mark.parametrize("mode", [UpdateMode.DRAIN, UpdateMode.RECOMPUTE])
async def test_discard_does_not_stop_an_update_under_way(oracle: Oracle, mode: UpdateMode) -> None:
    async with under_load(oracle) as load:
        prefill, worker = load.pair.prefill, load.pair.workers[0]
        await prefill.prepare_weights(oracle.path(2), 2)
        with worker.loop.gate.passing():  # a step that takes its time
            update = prefill.update_weights(oracle.path(2), 2, mode, WAIT_S)
            updating_now = asyncio.create_task(update)
            while worker.loop.gate.is_open:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await prefill.discard_weights()
        assert (await updating_now).epoch_number == 2
        first = await prefill.prefill(request(prompt(20)))
        assert_drawn_by_fresh_engines(oracle, request(prompt(20)), [first.event])
        await prefill.abort("r", 1)
        await settled(load.pair)
        await load.pair.assert_nothing_held()


def _when_told(
    load: Callable[[Engine, Path], LoadedWeights], loading: threading.Event, go_on: threading.Event
) -> Callable[[Engine, Path], LoadedWeights]:
    def load_when_told(engine: Engine, folder: Path) -> LoadedWeights:
        loading.set()
        assert go_on.wait(WAIT_S)
        return load(engine, folder)

    return load_when_told


async def _away(model_id: str, *, timeout_s: float) -> EpochsOfModel:
    raise Unavailable(f"no answer within {timeout_s} s of what is known of {model_id}")
