"""Promise 3 with vLLM: new weights never meet old KV, whoever names them; a reset says what it knows."""

from __future__ import annotations

import pytest

from kvstore.clock import ManualClock
from kvstore.errors import Unavailable
from kvstore.integrations.vllm.identity import Identity
from kvstore.nouns import Epoch, WeightsDigest
from tests.kvstore.integrations.vllm.parts import (
    PROMPT,
    W1,
    W2,
    W3,
    counted,
    engine_of,
    serve,
    setup_of,
)
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore, on_loop


def publish(store: LocalStore, number: int, weights: bytes) -> None:
    """What a trainer does before it changes the weights."""
    on_loop(store.admin.register_epoch("m", Epoch(number, WeightsDigest(weights))))
    on_loop(store.admin.advance_epoch("m", number))


def test_weights_get_the_number_that_the_store_has_for_them_or_the_next(store: LocalStore) -> None:
    on_loop(store.admin.register_epoch("m", Epoch(4, WeightsDigest(W1))))
    engines = [engine_of(store, weights) for weights in (W2, W1, W3, W2)]
    for engine in engines:
        engine.side.settle()
    known = [engine.scheduling.identity.epoch for engine in engines]
    assert [epoch and epoch.number for epoch in known] == [5, 4, 6, 5]
    for engine in engines:
        engine.close()


def test_the_weights_are_named_at_start_also_without_a_store(store: LocalStore) -> None:
    """Later their files may be others."""
    setup, clock, asked = setup_of(), ManualClock(), []
    store.is_down = True
    side = store.side(setup.config, clock)

    def weights() -> WeightsDigest:
        asked.append(clock.now())
        return WeightsDigest(W1)

    identity = Identity(side, setup, weights)
    identity.begin()
    assert side.settle()
    assert (asked, identity.epoch) == ([0.0], None)
    store.is_down = False
    clock.advance(3600.0)
    epoch = on_loop(identity.known())
    assert epoch is not None
    assert (epoch.weights_digest, len(asked)) == (W1, 1)
    side.close()


def test_two_that_ask_at_once_for_a_number_get_two(store: LocalStore) -> None:
    engines = [engine_of(store, bytes([n]) * 16) for n in range(3)]
    for engine in engines:
        engine.side.settle()
    epochs = {engine.scheduling.identity.epoch for engine in engines}
    assert len(epochs) == len({epoch.number for epoch in epochs if epoch}) == 3
    for engine in engines:
        engine.close()


def test_with_epoch_store_a_trainers_weights_have_its_number(store: LocalStore) -> None:
    setup = setup_of(epoch="store")
    publish(store, 1, W1)
    engine = engine_of(store, W1, setup=setup)
    first = serve(engine, PROMPT, "before")
    for number in range(2, 19):  # 17 updates in place
        weights = bytes([number]) * 16
        publish(store, number, weights)
        assert engine.reset(weights)
        assert serve(engine, PROMPT, f"cold{number}").loaded == 0, "nothing of older weights"
        engine.cached.clear()
        engine.cached_as.clear()
        assert serve(engine, PROMPT, f"warm{number}").loaded == 36, "but of its own"
    old = engine_of(store, bytes([9]) * 16, setup=setup_of())
    assert serve(old, PROMPT, "old").loaded == 36, "who still has them is served"
    assert first.loaded == 0
    engine.close()
    old.close()


def test_a_store_without_an_epoch_of_the_model_shares_nothing_until_there_is_one(store: LocalStore) -> None:
    clock = ManualClock()
    engine = engine_of(store, W1, setup=setup_of(epoch="store"), clock=clock)
    serve(engine, PROMPT, "a")
    assert engine.workers.saves == []
    assert counted(engine)["miss:no_epoch"] == 1
    publish(store, 0, W1)
    clock.advance(60.0)
    serve(engine, PROMPT, "b")
    assert engine.workers.saves[0].epoch == Epoch(0, WeightsDigest(W1))
    engine.close()


def test_after_a_reset_weights_without_a_name_are_shared_with_nobody(store: LocalStore) -> None:
    serve(one := engine_of(store, W1), PROMPT, "a")
    assert one.reset(W2)
    assert serve(one, PROMPT, "b").loaded == 0
    other = engine_of(store, W1)
    assert serve(other, PROMPT, "c").loaded == 36, "the old ones are not touched"
    named = {save.epoch.weights_digest for save in one.workers.saves}
    assert W1 in named
    assert W2 not in named
    assert len(named) == 2
    one.close()
    other.close()


def test_a_request_that_lived_before_a_reset_neither_loads_nor_saves(store: LocalStore) -> None:
    publish(store, 1, W1)
    engine = engine_of(store, W1, setup=setup_of(epoch="store"))
    request = FakeRequest("r", list(PROMPT), max_tokens=30)
    engine.add(request)
    for _ in range(8):
        engine.side.settle()
        engine.step()
    before = len(engine.workers.saves)
    assert before > 0
    publish(store, 2, W2)
    other = engine_of(store, W2, setup=setup_of(epoch="store"))
    serve(other, PROMPT)
    engine.reset(W2)
    engine.preempt(request)
    engine.cached.clear()
    engine.cached_as.clear()
    engine.run()
    assert len(engine.workers.saves) == before
    assert request.loaded == 0
    engine.close()
    other.close()


def test_nothing_is_saved_while_blocks_of_before_a_reset_are_in_use(store: LocalStore) -> None:
    """vLLM's own prefix cache was not emptied then: a new request may stand on old blocks."""
    publish(store, 1, W1)
    engine = engine_of(store, W1, setup=setup_of(epoch="store"))
    running = FakeRequest("r", list(PROMPT), max_tokens=30)
    engine.add(running)
    for _ in range(8):
        engine.side.settle()
        engine.step()
    before = len(engine.workers.saves)
    publish(store, 2, W2)
    assert engine.reset(W2) is False
    late = FakeRequest("late", list(PROMPT))
    engine.add(late)
    late.weights.add(W1)  # by vLLM's own cache, which says that it was not reset
    engine.run()
    assert len(engine.workers.saves) == before
    assert counted(engine)["resets_incomplete"] == 1
    assert engine.reset(W2)
    serve(engine, PROMPT, "after")
    assert len(engine.workers.saves) > before
    engine.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_lookup_of_before_a_reset_is_not_used_after_it(store: LocalStore, seed: int) -> None:
    publish(store, 1, W1)
    serve(one := engine_of(store, W1, setup=setup_of(epoch="store")), PROMPT)
    two = engine_of(store, W1, setup=setup_of(epoch="store"), seed=seed)
    request = FakeRequest("r", list(PROMPT))
    two.add(request)
    if seed % 2:
        two.side.settle()
    publish(store, 2, W2)
    two.reset(W2)
    two.run()
    assert request.loaded == 0
    assert two.workers.saves == []
    one.close()
    two.close()


def test_with_epoch_store_a_shard_that_does_not_answer_is_waited_for(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the one that was told of newer weights: what the others say may be old."""

    async def refuse(*_: object, **__: object) -> None:
        raise Unavailable("gone")

    publish(store, 1, W1)
    newer = Epoch(2, WeightsDigest(W2))
    on_loop(store.drivers[0].register_epoch("m", newer, timeout_s=5.0))
    on_loop(store.drivers[0].advance_epoch("m", 2, timeout_s=5.0))
    clock = ManualClock()
    with monkeypatch.context() as patch:
        patch.setattr(store.drivers[0], "epochs", refuse)
        engine = engine_of(store, W2, setup=setup_of(epoch="store"), clock=clock)
        serve(engine, PROMPT, "a")
        assert engine.workers.saves == []
    clock.advance(60.0)
    serve(engine, PROMPT, "b")
    assert engine.scheduling.identity.epoch == newer
    engine.close()
