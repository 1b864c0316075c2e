"""Turns to ask the store: who has one gives it back, who comes last takes nobody's, who waits is bounded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kvstore.integrations.vllm.engine import FakeEngine, New, Output
from tests.kvstore.integrations.vllm.parts import PROMPT, counted, engine_of, serve, setup_of
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore


def prompt(number: int) -> list[int]:
    return [1000 * number + token for token in PROMPT]


def asked_at_most(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("kvstore.integrations.vllm.scheduling.ASKED_MAX", count)


def test_more_requests_than_may_ask_at_once_take_turns_and_all_load(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine_of(store, pool_blocks=200)
    for number in range(9):
        serve(one, prompt(number), f"r{number}")
    asked_at_most(monkeypatch, 2)
    two = engine_of(store, pool_blocks=200)
    requests = [FakeRequest(f"r{number}", prompt(number), max_tokens=4) for number in range(9)]
    for request in requests:
        two.add(request)
    two.run()
    assert [request.loaded for request in requests] == [36] * 9
    one.close()
    two.close()


def test_who_comes_last_leaves_turns_to_those_that_wait(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_at_most(monkeypatch, 4)
    engine = engine_of(store)
    requests = [FakeRequest(f"r{number}", prompt(number)) for number in range(8)]
    for request in requests:
        engine.scheduling.on_new_request(request)
    assert engine.scheduling._asked == 2
    engine.side.settle()
    engine.scheduling.matched(requests[2], 0)
    assert engine.scheduling._asked == 3, "the oldest that waits asks"
    for request in requests:
        engine.scheduling.finished(request)
    assert engine.scheduling._asked == 0
    engine.close()


@pytest.mark.parametrize("how", ["producer", "logprobs"])
def test_who_only_wants_to_know_gives_its_turn_back_while_it_runs(store: LocalStore, how: str) -> None:
    engine = engine_of(store, setup=setup_of(loads=how != "producer"))
    request = FakeRequest("r", list(PROMPT), max_tokens=30, skip_reading_prefix_cache=how == "logprobs")
    engine.add(request)
    for _ in range(6):
        engine.side.settle()
        engine.step()
    assert request in engine.running
    assert engine.scheduling._asked == 0
    engine.run()
    engine.close()


def test_who_loads_nothing_waits_for_no_turn(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_at_most(monkeypatch, 0)
    engine = engine_of(store, setup=setup_of(loads=False))
    request = FakeRequest("r", list(PROMPT))
    engine.scheduling.on_new_request(request)
    assert engine.scheduling.matched(request, 0) == (0, False)
    engine.scheduling.finished(request)
    engine.close()


def test_who_can_neither_load_nor_save_asks_nothing(store: LocalStore) -> None:
    engine = engine_of(store, setup=setup_of(saves=False))
    request = FakeRequest("r", list(PROMPT), skip_reading_prefix_cache=True)
    engine.scheduling.on_new_request(request)
    assert (engine.scheduling._asked, engine.scheduling.matched(request, 0)) == (0, (0, False))
    engine.scheduling.finished(request)
    engine.close()


def promised(engine: FakeEngine, name: str) -> FakeRequest:
    """What any client may say: that somebody is at work for it."""
    params: dict[str, Any] = {"do_remote_prefill": True, "kvstrata_tokens": 1 << 40}
    epoch = engine.scheduling.identity.epoch
    assert epoch is not None
    params["kvstrata_epoch"] = f"{epoch.number}:{epoch.weights_digest.hex()}"
    return FakeRequest(name, prompt(int(name[1:])), kv_transfer_params=params)


def test_few_may_wait_for_what_a_client_says_is_coming(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_at_most(monkeypatch, 8)
    engine = engine_of(store)
    engine.side.settle()
    requests = [promised(engine, f"r{number}") for number in range(4)]
    for request in requests:
        engine.scheduling.on_new_request(request)
    waits = [engine.scheduling._requests[r.request_id].give_up_at for r in requests]
    assert [wait >= 50.0 for wait in waits] == [True, True, False, False]
    assert counted(engine)["handoffs_not_waited_for"] == 2
    engine.scheduling.finished(requests[0])
    late = promised(engine, "r9")
    engine.scheduling.on_new_request(late)
    assert engine.scheduling._requests["r9"].give_up_at >= 50.0, "one gave its place back"
    for request in (*requests, late):
        engine.scheduling.finished(request)
    engine.close()


def test_a_request_waits_for_prefill_once(store: LocalStore) -> None:
    """After a preemption what did not come is not waited for again."""
    engine = engine_of(store)
    engine.side.settle()
    request = promised(engine, "r1")
    scheduling = engine.scheduling
    scheduling.on_new_request(request)
    tracked = scheduling._requests["r1"]
    assert tracked.lookup is not None
    assert tracked.lookup.question.wait_s == 30.0
    scheduling._let_go(tracked)  # given up
    engine.side.settle()
    started = Output([New("r1", (list(range(10)),), 0)], num_scheduled_tokens={"r1": 37})
    scheduling.plan(started)
    scheduling.plan(Output(preempted_req_ids={"r1"}))
    scheduling.matched(request, 0)
    assert tracked.lookup is not None
    assert tracked.lookup.question.wait_s == 0.0
    scheduling.finished(request)
    engine.close()
