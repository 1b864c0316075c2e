"""Promise: with speculation, whoever guesses, a sequence is to the bit what it is without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.speculation.base import DrafterFactory
from engine.speculation.ngram import NGramDrafter
from engine.types import FinishReason, GenerationRequest, StepResult, TokenEvent
from tests.engine.conftest import Logits, prompt, request, run, tokens_of
from tests.engine.speculation.drafters import Guess, Guessing, engine_with, oracle, wrong
from tests.tiny_model import VOCAB_SIZE

LOOPING = prompt(20) * 3  # a prompt that n-grams match
REQUESTS = [
    request("greedy", prompt(40), 45),
    request("looping", LOOPING, 40),
    request("sampled", prompt(20, seed=2) * 3, 40, temperature=0.7, seed=3),
    request("cold", prompt(35, seed=4), 30, temperature=0.05, top_p=0.9, seed=4),
    request(
        "adjusted",
        prompt(21, seed=6) * 3,
        40,
        seed=5,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        logprobs=2,
    ),
    request("resumed", prompt(33), 30, output=prompt(7, seed=9)),
]


def texts(results: Sequence[StepResult], requests: Sequence[GenerationRequest]) -> dict[str, list[int]]:
    """All tokens of each."""
    return {r.request_id: [*r.prompt_ids, *r.output_ids, *tokens_of(results, r.request_id)] for r in requests}


def events_of(results: Sequence[StepResult]) -> dict[str, list[TokenEvent]]:
    """With logprobs, where asked for."""
    told: dict[str, list[TokenEvent]] = {}
    for result in results:
        for event in result.events:
            told.setdefault(event.request_id, []).append(event)
    return told


def run_all(engine: Engine, requests: Sequence[GenerationRequest]) -> list[StepResult]:
    for each in requests:
        engine.admit(each)
    results = run(engine)
    engine.check_integrity()
    assert engine.free_blocks == engine.config.pool_blocks
    return results


def blocks_of(results: Sequence[StepResult]) -> dict[tuple[str, int], bytes]:
    blocks = [block for result in results for block in result.blocks]
    named = {(block.request_id, block.chain_index): block.payload.tobytes() for block in blocks}
    assert len(named) == len(blocks), "a block is completed once"
    return named


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> list[StepResult]:
    return run_all(engine_with(tiny_folder, None), REQUESTS)


@pytest.mark.parametrize("step_tokens_max", [512, 64])
@pytest.mark.parametrize("who", ["ngram", "oracle", "wrong"])
def test_tokens_and_blocks_are_those_of_plain_decoding(
    who: str, step_tokens_max: int, tiny_folder: Path, plain: list[StepResult]
) -> None:
    known = list(texts(plain, REQUESTS).values())
    drafter: DrafterFactory = {"ngram": NGramDrafter, "oracle": oracle(*known), "wrong": wrong(*known)}[who]
    results = run_all(
        engine_with(tiny_folder, drafter, step_tokens_max=step_tokens_max, running_max=8), REQUESTS
    )
    assert events_of(results) == events_of(plain)
    assert blocks_of(results) == blocks_of(plain), (
        "every block that leaves is the one computed without drafts"
    )
    proposed = sum(result.drafts_proposed for result in results)
    accepted = sum(result.drafts_accepted for result in results)
    assert proposed > 0
    if who == "oracle":
        assert accepted == proposed
        assert len(results) < len(plain) / 2
    if who == "wrong":
        assert accepted == 0
        assert proposed < sum(result.tokens_computed for result in plain) / 5, "it is held back"


def test_events_come_in_order_and_count_from_where_the_sequence_stood(
    tiny_folder: Path, plain: list[StepResult]
) -> None:
    drafter = oracle(*texts(plain, REQUESTS).values())
    results = run_all(engine_with(tiny_folder, drafter), REQUESTS)
    for each in REQUESTS:
        events = [e for result in results for e in result.events if e.request_id == each.request_id]
        assert [event.index for event in events] == list(
            range(len(each.output_ids), each.sampling.max_tokens)
        )
        assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_same_bits(dtype: str, tiny_folder: Path, seen_logits: Logits) -> None:
    wanted = [request("a", prompt(250), 24, seed=1), request("b", LOOPING, 24, temperature=0.8, seed=2)]
    plain = run_all(engine_with(tiny_folder, None, dtype=dtype), wanted)
    expected = dict(seen_logits)
    seen_logits.clear()
    drafter = oracle(*texts(plain, wanted).values())
    drafted = run_all(engine_with(tiny_folder, drafter, dtype=dtype), wanted)
    assert len(drafted) < len(plain)
    assert seen_logits.keys() == expected.keys()
    assert all(torch.equal(seen_logits[key], expected[key]) for key in expected)


def endings(engine: Engine, wanted: GenerationRequest) -> list[TokenEvent]:
    return [event for result in run_all(engine, [wanted]) for event in result.events]


@pytest.mark.parametrize("fields", [{"stop": ("q",)}, {"stop_token_ids": (0,)}, {"max_tokens": 11}])
def test_an_end_inside_an_accepted_run_ends_it_there(
    fields: dict[str, object], tiny_folder: Path, plain: list[StepResult]
) -> None:
    """The oracle guesses on beyond the end; nothing of that may be told or computed."""
    text = texts(plain, REQUESTS)["greedy"]
    output = tokens_of(plain, "greedy")
    engine = engine_with(tiny_folder, oracle(text), draft_tokens_max=16)
    if "stop" in fields:
        letters = (engine.tokenizer.decode([token]) for token in output[4:])
        fields = {"stop": (next(letter for letter in letters if letter.isascii() and letter.isprintable()),)}
    if "stop_token_ids" in fields:
        fields = {"stop_token_ids": (output[9],)}
    wanted = request("a", prompt(40), **({"max_tokens": 45} | fields))  # type: ignore[arg-type]
    events = endings(engine, wanted)
    assert events == endings(engine_with(tiny_folder, None), wanted)
    assert events[-1].finish is not None
    assert len(events) < 45


def test_a_sequence_that_parks_after_its_token_gets_no_drafts(
    tiny_folder: Path, plain: list[StepResult]
) -> None:
    known = texts(plain, REQUESTS)["greedy"]
    engine = engine_with(tiny_folder, oracle(known))
    engine.admit(request("greedy", known[:64], 20), hold=True)
    results = run(engine)
    engine.release("greedy")
    engine.admit(
        request("greedy", known[:63], 20, output=known[63:64]),
        hold=True,
        blocks=[block.payload for result in results for block in result.blocks][:1],
    )
    results += run(engine)
    assert [len(result.events) for result in results] == [1, 1]
    assert sum(result.drafts_proposed for result in results) == 0
    assert engine.free_blocks == 62, "no slot was taken for a draft"


def test_a_tail_holds_accepted_tokens_only(tiny_folder: Path, plain: list[StepResult]) -> None:
    known = texts(plain, REQUESTS)["greedy"]
    engine = engine_with(tiny_folder, wrong(known))
    engine.admit(request("greedy", known[:40], 20))
    while engine.step().drafts_proposed == 0:
        pass
    tail = engine.take_tail("greedy")
    other = engine_with(tiny_folder, None)
    other.admit(request("greedy", known[:40], 20))
    while (expected := other.take_tail("greedy")) is None or tail is None or expected.tokens < tail.tokens:
        other.step()
    assert expected.checksum == tail.checksum


MALICE: dict[str, Guess] = {
    "out of vocabulary": lambda tokens, count: [VOCAB_SIZE] * count,
    "negative": lambda tokens, count: [-1] * count,
    "right, then nonsense": lambda tokens, count: [tokens[-1], 2**40, 5],
    "far too long": lambda tokens, count: [tokens[-1]] * 10_000,
}


@pytest.mark.parametrize("how", MALICE)
def test_malice_costs_time_only(how: str, tiny_folder: Path, plain: list[StepResult]) -> None:
    results = run_all(engine_with(tiny_folder, lambda: Guessing(MALICE[how])), REQUESTS)
    assert texts(results, REQUESTS) == texts(plain, REQUESTS)
    assert blocks_of(results) == blocks_of(plain)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_drafter_leaves_the_output_as_it_is(
    data: st.DataObject, tiny_folder: Path, plain: list[StepResult]
) -> None:
    """Right for a while, then anything; in steps of any size."""
    known = texts(plain, REQUESTS)
    right = oracle(*known.values())
    rights, noise = st.integers(0, 6), st.lists(st.integers(-2, VOCAB_SIZE + 1), max_size=6)

    def guess(tokens: Sequence[int], count: int) -> Sequence[int]:
        return [*right().propose(tokens, data.draw(rights)).tokens, *data.draw(noise)]

    chosen = data.draw(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=4, unique=True))
    limits = {
        "step_tokens_max": data.draw(st.integers(8, 200)),
        "running_max": 8,
        "draft_tokens_max": data.draw(st.integers(1, 12)),
    }
    results = run_all(engine_with(tiny_folder, lambda: Guessing(guess), **limits), chosen)
    assert texts(results, chosen) == {each.request_id: known[each.request_id] for each in chosen}
    names = {each.request_id for each in chosen}
    assert blocks_of(results) == {key: b for key, b in blocks_of(plain).items() if key[0] in names}
    assert all(
        r.tokens_computed + r.drafts_proposed - r.drafts_accepted <= limits["step_tokens_max"]
        for r in results
    )
