"""Another connector beside ours under vLLM's MultiConnector: what it loads is never published as ours."""

from __future__ import annotations

import pytest

from tests.kvstore.integrations.vllm.engine import FakeEngine, New, Output
from tests.kvstore.integrations.vllm.parts import PROMPT, counted, engine_of, serve, setup_of
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore


def arrives(engine: FakeEngine, name: str, local: int = 0, **fields: object) -> FakeRequest:
    """It is asked for, and we have nothing."""
    request = FakeRequest(name, [*PROMPT[:36], hash(name) % 1000], **fields)  # type: ignore[arg-type]
    engine.scheduling.on_new_request(request)
    assert engine.side.settle()
    assert engine.scheduling.matched(request, local) == (0, False)
    engine.scheduling.allocated(name, [], 0)
    return request


def step(engine: FakeEngine, *begun: tuple[str, int]) -> int:
    """Requests with so many tokens computed are scheduled for the rest; how many saves that plans."""
    new = [New(name, (list(range(10)),), computed) for name, computed in begun]
    output = Output(new, num_scheduled_tokens={name: 37 - computed for name, computed in begun})
    return len(engine.scheduling.plan(output).saves)


def end(engine: FakeEngine, *requests: FakeRequest) -> None:
    for request in requests:
        engine.scheduling.finished(request)
    engine.close()


def test_vllms_own_hits_and_no_hits_are_saved(store: LocalStore) -> None:
    engine = engine_of(store)
    requests = [arrives(engine, "a"), arrives(engine, "b", local=16)]
    assert step(engine, ("a", 0), ("b", 16)) == 2
    assert counted(engine).get("other_connector_loads", 0) == 0
    end(engine, *requests)


def test_from_a_siblings_first_load_on_nothing_is_saved_until_a_clean_reset(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of(store)
    first, second = arrives(engine, "first"), arrives(engine, "second", local=4)
    assert step(engine, ("first", 0), ("second", 20)) == 0, "the other may stand on its blocks"
    third, fourth = arrives(engine, "third"), arrives(engine, "fourth")
    assert step(engine, ("third", 0)) == 0, "vLLM's cache mixes requests"
    assert step(engine, ("fourth", 16)) == 0
    assert counted(engine)["other_connector_loads"] == 2
    assert capsys.readouterr().out.count("another connector of this vLLM loads KV") == 1
    for request in (first, second, third, fourth):
        engine.scheduling.finished(request)
    engine.is_cache_free = lambda: False  # type: ignore[method-assign]
    engine.scheduling._has_free_cache = lambda: False
    assert not engine.scheduling.reset()
    fifth = arrives(engine, "fifth")
    assert step(engine, ("fifth", 0)) == 0
    engine.scheduling._has_free_cache = lambda: True
    engine.scheduling.finished(fifth)
    assert engine.scheduling.reset()
    assert engine.side.settle()
    sixth = arrives(engine, "sixth")
    assert step(engine, ("sixth", 0)) == 1
    end(engine, sixth)


def test_a_load_for_a_request_that_stays_out_counts_too(store: LocalStore) -> None:
    """Its text is in vLLM's cache for everybody."""
    engine = engine_of(store)
    image = arrives(engine, "image", mm_features=("an image",))
    text = arrives(engine, "text")
    assert step(engine, ("image", 16), ("text", 0)) == 0
    end(engine, image, text)


def test_a_load_after_a_preemption_counts(store: LocalStore) -> None:
    engine = engine_of(store)
    request = arrives(engine, "r")
    assert step(engine, ("r", 0)) == 1
    engine.scheduling.plan(Output(preempted_req_ids={"r"}))
    request.all_token_ids += [5] * 8
    assert engine.side.settle()
    while (found := engine.scheduling.matched(request, 0))[0] is None:
        assert engine.side.settle()
    assert found == (0, False)
    output = Output(num_scheduled_tokens={"r": 13})
    cached = output.scheduled_cached_reqs
    cached.req_ids, cached.resumed_req_ids = ["r"], {"r"}
    cached.new_block_ids, cached.num_computed_tokens = [(list(range(12)),)], [32]
    assert engine.scheduling.plan(output).saves == []
    assert counted(engine)["other_connector_loads"] == 1
    end(engine, request)


def test_a_load_for_a_request_that_ends_before_its_first_step_counts(store: LocalStore) -> None:
    engine = engine_of(store)
    gone = arrives(engine, "gone")
    gone.computed = 16  # as while vLLM waits for a sibling's load, which it then keeps
    engine.scheduling.finished(gone)
    later = arrives(engine, "later")
    assert step(engine, ("later", 0)) == 0
    end(engine, later)


def test_the_other_was_first_and_we_had_a_hit_too(store: LocalStore) -> None:
    serve(one := engine_of(store), PROMPT)
    two = engine_of(store)
    request = FakeRequest("r", [*PROMPT, *range(12)])
    two.scheduling.on_new_request(request)
    assert two.side.settle()
    assert two.scheduling.matched(request, 0) == (36, True)
    two.scheduling.allocated("r", [], 0)
    output = Output([New("r", (list(range(13)),), 36)], num_scheduled_tokens={"r": 13})
    assert two.scheduling.plan(output).saves == []
    one.close()
    end(two, request)


def test_what_we_load_ourselves_is_no_siblings(store: LocalStore) -> None:
    serve(one := engine_of(store), PROMPT)
    two = engine_of(store, setup=setup_of())
    assert serve(two, [*PROMPT, *range(12)]).loaded == 36
    assert two.workers.saves != []
    assert counted(two).get("other_connector_loads", 0) == 0
    one.close()
    two.close()
