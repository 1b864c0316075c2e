"""A request's parameters hold through the engine, and wherever its sequence goes on."""

from __future__ import annotations

from typing import Any

import pytest

from engine.monolithic import generate
from engine.types import FinishReason, TokenEvent
from tests.engine.conftest import EngineFactory, prompt, request, run, tokens_of

RICH: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.6,
    "logit_bias": ((40, 3.0), (41, -5.0)),
    "min_tokens": 4,
    "seed": 11,
}


def events_of(make_engine: EngineFactory, **sampling: Any) -> list[TokenEvent]:
    engine = make_engine()
    engine.admit(request("a", prompt(40), 16, **sampling))
    return [event for result in run(engine) for event in result.events]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_sequence_that_goes_on_elsewhere_says_what_it_would_have(
    make_engine: EngineFactory, temperature: float
) -> None:
    """What preemption, a handoff and a worker's death have in common: prompt and output, in a new engine."""
    engine, wanted = make_engine(), RICH | {"temperature": temperature}
    whole = generate(engine, request("a", prompt(40), 16, **wanted))
    for said in range(1, 16, 3):
        assert generate(engine, request("a", prompt(40), 16, output=whole[:said], **wanted)) == whole
    assert whole != generate(engine, request("a", prompt(40), 16, temperature=temperature, seed=11))


def test_company_changes_nothing(make_engine: EngineFactory) -> None:
    alone = [event.token_id for event in events_of(make_engine, **RICH)]
    engine = make_engine()
    engine.admit(request("a", prompt(40), 16, **RICH))
    engine.admit(request("b", prompt(30, seed=1), 16))
    engine.admit(request("c", prompt(20, seed=2), 16, temperature=1.0, presence_penalty=-2.0))
    assert tokens_of(run(engine), "a") == alone


def test_logprobs_ride_with_their_tokens_and_resume_with_them(make_engine: EngineFactory) -> None:
    whole = events_of(make_engine, **RICH, logprobs=3)
    assert all(event.logprobs is not None and len(event.logprobs.top_ids) == 3 for event in whole)
    engine = make_engine()
    said = [event.token_id for event in whole[:7]]
    engine.admit(request("a", prompt(40), 16, output=said, **RICH, logprobs=3))
    rest = [event for result in run(engine) for event in result.events]
    assert [event.logprobs for event in rest] == [event.logprobs for event in whole[7:]]
    assert {event.logprobs for event in events_of(make_engine)} == {None}


def test_no_end_token_comes_before_min_tokens(make_engine: EngineFactory) -> None:
    """The bias would have it at once; held back, it comes first thing after."""
    wanted: dict[str, Any] = {"stop_token_ids": (50,), "logit_bias": ((50, 100.0),)}
    assert [event.token_id for event in events_of(make_engine, **wanted)] == [50]
    events = events_of(make_engine, **wanted, min_tokens=5)
    assert len(events) == 6
    assert 50 not in [event.token_id for event in events[:5]]
    assert (events[5].token_id, events[5].finish) == (50, FinishReason.STOP)


def test_the_models_own_end_token_is_held_back_too(make_engine: EngineFactory) -> None:
    wanted: dict[str, Any] = {"ignore_eos": False, "logit_bias": ((2, 100.0),)}
    assert [event.token_id for event in events_of(make_engine, **wanted)] == [2]
    assert [event.token_id for event in events_of(make_engine, **wanted, min_tokens=3)].index(2) == 3


def test_a_stop_string_counts_from_min_tokens_on(make_engine: EngineFactory) -> None:
    """Every token is the letter: the stop is complete at once, and again with each token."""
    engine = make_engine()
    (letter,) = engine.tokenizer.encode("x")
    wanted: dict[str, Any] = {"stop": ("xx",), "logit_bias": ((letter, 100.0),)}
    assert len(events_of(make_engine, **wanted)) == 2
    events = events_of(make_engine, **wanted, min_tokens=6)
    assert len(events) == 7
    assert events[-1].finish is FinishReason.STOP
    said = [event.token_id for event in events[:4]]
    resumed = generate(engine, request("a", prompt(40), 16, output=said, **wanted, min_tokens=6))
    assert len(resumed) == 7, "what was said before counts"


def test_a_request_that_leaves_no_token_fails_alone_and_says_why(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    everything = tuple(range(engine.model_config.vocab_size))
    engine.admit(request("a", prompt(40), 16, stop_token_ids=everything, min_tokens=2))
    engine.admit(request("b", prompt(40), 16))
    results = run(engine)
    (event,) = [event for result in results for event in result.events if event.request_id == "a"]
    assert event.finish is FinishReason.ERROR
    assert event.error is not None
    assert "min_tokens" in event.error
    assert len(tokens_of(results, "b")) == 16
