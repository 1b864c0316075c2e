"""The scheduler's half over vLLM in miniature and a store in this process: what is found, loaded, saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.clock import ManualClock
from kvstore.nouns import Tier
from tests.kvstore.integrations.vllm.parts import PROMPT, W1, W2, counted, engine_of, serve, setup_of
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore


@pytest.mark.parametrize("vllm_block", [2, 4, 8, 16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_engine_loads_what_the_first_saved(store: LocalStore, vllm_block: int, ranks: int) -> None:
    setup = setup_of(ranks, vllm_block)
    one = engine_of(store, setup=setup)
    first = serve(one, PROMPT)
    two = engine_of(store, setup=setup)
    second = serve(two, PROMPT)
    assert second.all_token_ids == first.all_token_ids
    assert second.loaded == 36 // vllm_block * vllm_block
    assert min(save.wanted for save in two.workers.saves) == 36, "what was found is not saved again"
    one.close()
    two.close()


def test_the_shortest_run_of_all_ranks_is_the_hit(store: LocalStore) -> None:
    two_ranks = setup_of(2)
    one = engine_of(store, setup=two_ranks)
    serve(one, PROMPT[:21])
    alone = setup_of(1)  # rank 0's namespace only
    other = engine_of(store, setup=alone)
    serve(other, PROMPT)
    both = engine_of(store, setup=two_ranks)
    assert serve(both, PROMPT).loaded == 20
    for engine in (one, other, both):
        engine.close()


@pytest.mark.parametrize("local", [4, 12, 20])
def test_a_load_begins_where_vllms_own_hit_ends(store: LocalStore, local: int) -> None:
    """Also in the middle of a block of ours: here vLLM's have 2 tokens."""
    setup = setup_of(vllm_block=2)
    one = engine_of(store, setup=setup)
    serve(one, PROMPT)
    two = engine_of(store, setup=setup_of(vllm_block=2, loads=False, saves=False))
    two.setup, two.scheduling._setup = setup, setup
    serve(two, PROMPT[: local + 3], "short", max_tokens=1)
    second = FakeRequest("long", list(PROMPT))
    two.add(second)
    two.run()
    assert second.loaded == 36 - (local + 2), "whole blocks of vLLM's were there already"
    one.close()
    two.close()


def test_short_hits_are_computed(store: LocalStore) -> None:
    one = engine_of(store)
    serve(one, PROMPT[:9])
    two = engine_of(store, setup=setup_of(min_load_tokens=12))
    assert serve(two, PROMPT).loaded == 0
    assert two.workers.saves[0].wanted == 8, "yet they need not be saved"
    one.close()
    two.close()


def test_a_salt_keeps_requests_apart(store: LocalStore) -> None:
    one = engine_of(store)
    serve(one, PROMPT, "a", cache_salt="mine")
    engine = engine_of(store)
    assert serve(engine, PROMPT, "b").loaded == 0
    assert serve(engine, PROMPT, "c", cache_salt="yours").loaded == 0
    other = engine_of(store)
    assert serve(other, PROMPT, "d", cache_salt="mine").loaded == 36
    for each in (one, engine, other):
        each.close()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("mm_features", ("an image",), "multimodal"), ("prompt_embeds", object(), "prompt_embeds")],
)
def test_what_tokens_do_not_say_stays_out(store: LocalStore, field: str, value: object, reason: str) -> None:
    engine = engine_of(store)
    request = FakeRequest("r", list(PROMPT))
    setattr(request, field, value)
    engine.add(request)
    engine.run()
    assert (request.loaded, engine.workers.saves) == (0, [])
    assert counted(engine)[f"left_out:{reason}"] == 1
    engine.close()


def test_roles_are_respected(store: LocalStore) -> None:
    producer = engine_of(store, setup=setup_of(loads=False))
    serve(producer, PROMPT, "a")
    assert len(producer.workers.saves) > 0
    again = engine_of(store, setup=setup_of(loads=False))
    assert serve(again, PROMPT, "b").loaded == 0
    consumer = engine_of(store, setup=setup_of(saves=False))
    assert serve(consumer, PROMPT, "c").loaded == 36
    assert consumer.workers.saves == []
    for each in (producer, again, consumer):
        each.close()


@pytest.mark.parametrize(("what", "tokens"), [("all", 44), ("prompt", 36), ("none", 0)])
def test_save_says_what_is_saved(store: LocalStore, what: str, tokens: int) -> None:
    engine = engine_of(store, setup=setup_of(save=what))
    serve(engine, PROMPT, max_tokens=10)
    assert max((save.end for save in engine.workers.saves), default=0) == tokens
    engine.close()


@pytest.mark.parametrize(("ahead", "drafts"), [(False, 0), (True, 0), (False, 3), (True, 3)])
def test_no_token_is_saved_before_it_is_known(store: LocalStore, ahead: bool, drafts: int) -> None:
    """Steps that run ahead and drafts that are refused: the workers judge what they are told to save."""
    engine = engine_of(store, ahead=ahead, drafts=drafts, seed=7)
    for number in range(3):
        serve(engine, PROMPT[number:], f"r{number}", max_tokens=40)
    assert max(save.end for save in engine.workers.saves) >= 68
    engine.close()


def test_a_hit_that_vllm_does_not_use_is_let_go(store: LocalStore) -> None:
    """As with another connector that was asked first: blocks are there, and no tokens to load."""
    serve(one := engine_of(store), PROMPT)
    engine = engine_of(store)
    request = FakeRequest("r", list(PROMPT))
    engine.scheduling.on_new_request(request)
    assert engine.side.settle()
    assert engine.scheduling.matched(request, 0) == (36, True)
    assert engine.scheduling.sources("r", 36) == {Tier.HOST: 36}
    assert store.leases() > 0
    engine.scheduling.allocated("r", [3, 4, 5], 0)
    assert engine.side.settle()
    assert store.leases() == 0
    assert engine.scheduling.matched(request, 0) == (0, False)
    engine.scheduling.finished(request)
    one.close()
    engine.close()


def test_a_lookup_that_takes_too_long_is_a_hit_of_nothing(store: LocalStore) -> None:
    clock = ManualClock()
    engine = engine_of(store, clock=clock, setup=setup_of(lookup_timeout_s=2.0))
    request = FakeRequest("r", list(PROMPT))
    engine.side.settle()
    begun: list[Any] = []
    engine.side.begin = begun.append  # type: ignore[method-assign, assignment]
    engine.scheduling.on_new_request(request)
    assert engine.scheduling.matched(request, 0) == (None, False)
    clock.advance(2.5)
    assert engine.scheduling.matched(request, 0) == (0, False)
    assert counted(engine)["miss:lookup_timeout"] == 1
    engine.scheduling.finished(request)
    for work in begun:
        work.close()
    engine.close()


def test_broken_loads_are_computed_and_asked_for_once(store: LocalStore) -> None:
    serve(one := engine_of(store), PROMPT)
    for broken in (0, 20):
        two = engine_of(store)
        two.workers.broken = {broken}
        request = serve(two, PROMPT)
        assert request.loaded == 36, "one load, however it ended"
        assert two.workers.saves[0].wanted == broken, "what was broken is offered again"
        assert counted(two)["loads_failed"] == 1
        two.close()
    one.close()


def test_a_request_whose_load_broke_never_loads_again(store: LocalStore) -> None:
    serve(one := engine_of(store), PROMPT)
    two = engine_of(store)
    two.workers.broken = {20}
    request = FakeRequest("r", list(PROMPT), max_tokens=20)
    two.add(request)
    while request not in two.running:
        two.side.settle()
        two.step()
    two.preempt(request)
    two.cached.clear()
    two.cached_as.clear()
    two.run()
    assert request.loaded == 36, "once"
    one.close()
    two.close()


def test_an_abort_while_loading_holds_the_lease_until_the_workers_are_through(store: LocalStore) -> None:
    serve(one := engine_of(store), PROMPT)
    two = engine_of(store)
    request = FakeRequest("r", list(PROMPT))
    two.add(request)
    two.side.settle()
    two.step()
    assert request.state == "loading"
    two.workers.loading = [(1, load) for _, load in two.workers.loading]
    two.abort(request)
    two.side.settle()
    assert store.leases() > 0, "they still read"
    two.run()
    two.side.settle()
    assert store.leases() == 0
    one.close()
    two.close()


def test_an_abort_while_looking_up_leaves_nothing(store: LocalStore) -> None:
    serve(one := engine_of(store), PROMPT)
    two = engine_of(store)
    for number in range(20):
        request = FakeRequest(f"r{number}", list(PROMPT))
        two.add(request)
        two.abort(request)
    two.side.settle()
    assert (store.leases(), two.scheduling.lookups.held) == (0, 0)
    one.close()
    two.close()


def test_a_preempted_request_finds_what_it_saved(store: LocalStore) -> None:
    engine = engine_of(store)
    request = FakeRequest("r", list(PROMPT), max_tokens=30)
    engine.add(request)
    while len(request.device_tokens) < len(PROMPT) + 12:
        engine.side.settle()
        engine.step()
    engine.cached.clear()
    engine.cached_as.clear()
    engine.preempt(request)
    engine.run()
    assert request.loaded >= 44
    engine.close()


def test_a_store_that_is_down_costs_nothing_but_misses(store: LocalStore) -> None:
    clock = ManualClock()
    store.is_down = True
    engine = engine_of(store, clock=clock)
    assert serve(engine, PROMPT, "a").loaded == 0
    assert engine.workers.saves == []
    store.is_down = False
    clock.advance(600.0)
    serve(engine, PROMPT, "b")
    assert engine.workers.saves[-1].end > 36, "it is saved once the store is there"
    engine.close()


def test_other_weights_meet_nothing(store: LocalStore) -> None:
    serve(one := engine_of(store, W1), PROMPT)
    two = engine_of(store, W2)
    assert serve(two, PROMPT).loaded == 0
    three = engine_of(store, W1)
    assert serve(three, PROMPT).loaded == 36
    for engine in (one, two, three):
        engine.close()


def test_an_adapter_is_a_namespace_of_its_files(store: LocalStore, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"tensors")
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(folder), load_inplace=False)
    serve(one := engine_of(store), PROMPT, "a", lora_request=lora)
    two = engine_of(store)
    assert serve(two, PROMPT, "b").loaded == 0
    again = SimpleNamespace(lora_int_id=9, lora_path=str(folder), load_inplace=False)
    three = engine_of(store)
    assert serve(three, PROMPT, "c", lora_request=again).loaded == 36
    lost = SimpleNamespace(lora_int_id=3, lora_path=str(folder / "nowhere"), load_inplace=False)
    four = engine_of(store)
    assert serve(four, PROMPT, "d", lora_request=lost).loaded == 0
    assert four.workers.saves == []
    assert counted(four)["miss:adapter_unknown"] == 1
    for engine in (one, two, three, four):
        engine.close()


def test_an_image_that_is_streamed_behind_text_leaves_the_rest_out(store: LocalStore) -> None:
    """vLLM extends the request it has: nobody is told of a new one."""
    engine = engine_of(store)
    request = FakeRequest("r", list(PROMPT), max_tokens=30)
    engine.add(request)
    while request not in engine.running:
        engine.side.settle()
        engine.step()
    request.mm_features = ("an image",)
    saved = len(engine.workers.saves)
    assert saved > 0
    for _ in range(12):
        engine.step()
    assert len(engine.workers.saves) == saved
    engine.cached.clear()
    engine.cached_as.clear()
    engine.preempt(request)
    engine.run()
    assert (request.loaded, len(engine.workers.saves)) == (0, saved)
    assert counted(engine)["left_out:multimodal"] >= 1
    engine.close()
