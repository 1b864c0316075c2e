"""Promise: a sequence ends where it should, keeps its slots until then, and none is ever lost."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.types import FinishReason, GenerationRequest, TokenEvent
from kvstore.errors import ConfigError, OverLimit
from tests.engine.conftest import EngineFactory, prompt, request, run, tokens_of
from tests.tiny_model import make_tiny_model


def events(engine: Engine, name: str = "a") -> list[TokenEvent]:
    return [event for result in run(engine) for event in result.events if event.request_id == name]


def free_run(make_engine: EngineFactory, max_tokens: int = 12) -> list[int]:
    """What the tiny model says to the prompt the tests below use, left alone."""
    engine = make_engine()
    engine.admit(request("a", prompt(40), max_tokens))
    return tokens_of(run(engine), "a")


# How sequences end


def test_max_tokens_ends_with_length(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(40), 5, attempt=3))
    seen = events(engine)
    assert [event.index for event in seen] == [0, 1, 2, 3, 4]
    assert [event.finish for event in seen] == [None] * 4 + [FinishReason.LENGTH]
    assert {event.attempt for event in seen} == {3}


def test_the_models_end_token_stops_unless_ignored(tmp_path: Path, make_engine: EngineFactory) -> None:
    free = free_run(make_engine)
    end = free[3]
    folder = make_tiny_model(tmp_path, eos_token_id=[2, end])
    engine = make_engine(folder)
    engine.admit(request("a", prompt(40), 12, ignore_eos=False))
    seen = events(engine)
    assert [event.token_id for event in seen] == free[: free.index(end) + 1]
    assert seen[-1].finish is FinishReason.STOP
    engine.admit(request("a", prompt(40), 12, ignore_eos=True))
    assert [event.token_id for event in events(engine)] == free


def test_stop_token_ids_stop_even_when_end_tokens_are_ignored(make_engine: EngineFactory) -> None:
    free = free_run(make_engine)
    engine = make_engine()
    engine.admit(request("a", prompt(40), 12, stop_token_ids=(free[5],)))
    seen = events(engine)
    assert [event.token_id for event in seen] == free[: free.index(free[5]) + 1]
    assert seen[-1].finish is FinishReason.STOP


def ascii_run(make_engine: EngineFactory) -> tuple[int, list[int], str]:
    """A seed whose sampled output holds two ASCII characters in a row; the output; those two as text."""
    for seed in range(200):
        engine = make_engine()
        engine.admit(request("a", prompt(40), 12, temperature=1.0, seed=seed))
        tokens = tokens_of(run(engine), "a")
        for first, second in itertools.pairwise(tokens[3:]):
            text = engine.tokenizer.decode([first, second])
            if text.isascii() and text.isalnum() and len(text) == 2:
                return seed, tokens, text
    raise AssertionError("no seed spells two letters in a row")


def test_stop_strings_stop_over_token_boundaries_and_attempts(make_engine: EngineFactory) -> None:
    seed, free, stop = ascii_run(make_engine)
    engine = make_engine()
    engine.admit(request("a", prompt(40), 12, temperature=1.0, seed=seed, stop=(stop,)))
    seen = events(engine)
    ended = [event.token_id for event in seen]
    assert ended == free[: len(ended)]
    assert seen[-1].finish is FinishReason.STOP
    assert stop in engine.tokenizer.decode(ended)
    resumed = request("a", prompt(40), 12, output=ended[:-1], temperature=1.0, seed=seed, stop=(stop,))
    engine.admit(resumed)
    (last,) = events(engine)
    assert (last.token_id, last.finish) == (ended[-1], FinishReason.STOP), "half a stop string was replayed"


def test_the_models_length_ends_a_sequence(make_engine: EngineFactory) -> None:
    engine = make_engine(max_model_len=48)
    engine.admit(request("a", prompt(40), 100))
    seen = events(engine)
    assert len(seen) == 8
    assert seen[-1].finish is FinishReason.LENGTH


def test_output_goes_on_from_what_was_streamed(make_engine: EngineFactory) -> None:
    free = free_run(make_engine)
    engine = make_engine()
    engine.admit(request("a", prompt(40), 12, output=free[:5], attempt=1))
    seen = events(engine)
    assert [event.index for event in seen] == list(range(5, 12))
    assert [event.token_id for event in seen] == free[5:]


# Holding, releasing, admitting


def test_a_held_sequence_parks_after_one_token_until_released(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(70), 12), hold=True)
    assert len(events(engine)) == 1
    assert not engine.has_work()
    assert engine.free_blocks == 64 - 3
    engine.release("a")
    engine.release("a")
    assert engine.free_blocks == 64
    engine.check_integrity()


def test_a_held_sequence_keeps_its_kv_even_if_its_first_token_is_its_last(
    make_engine: EngineFactory,
) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(40), 1), hold=True)
    assert events(engine)[0].finish is FinishReason.LENGTH
    assert engine.take_tail("a") is not None


def test_release_in_mid_prefill_leaves_the_others_alone(make_engine: EngineFactory) -> None:
    free = free_run(make_engine)
    engine = make_engine(step_tokens_max=64)
    engine.admit(request("gone", prompt(300, seed=1), 12))
    engine.admit(request("a", prompt(40), 12))
    engine.step()
    engine.release("gone")
    assert [event.token_id for event in events(engine)] == free
    assert engine.free_blocks == 64


def test_what_does_not_fit_now_fits_later(make_engine: EngineFactory) -> None:
    engine = make_engine(pool_blocks=4)
    engine.admit(request("a", prompt(40), 30))
    second = request("b", prompt(40), 30)
    assert engine.can_ever_admit(second)
    assert not engine.can_admit(second)
    with pytest.raises(OverLimit, match="needs 3 KV blocks of 1 free"):
        engine.admit(second)
    run(engine)
    engine.admit(second)
    assert len(events(engine, "b")) == 30


def test_what_never_fits_says_so(make_engine: EngineFactory) -> None:
    engine = make_engine(pool_blocks=4, max_model_len=1000)
    never = request("a", prompt(128), 1)
    assert not engine.can_ever_admit(never)
    with pytest.raises(OverLimit, match="leaves no room for output: this engine takes 128"):
        engine.admit(never)
    engine.admit(request("a", prompt(40), 500))
    assert events(engine, "a")[-1].finish is FinishReason.LENGTH, "it ends where the pool does"


def test_running_sequences_are_bounded_and_parked_ones_do_not_count(make_engine: EngineFactory) -> None:
    engine = make_engine(running_max=2)
    for name in "ab":
        engine.admit(request(name, prompt(5), 3), hold=True)
    assert not engine.can_admit(request("c", prompt(5), 3))
    engine.step()
    assert engine.can_admit(request("c", prompt(5), 3))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (request("a", ()), "no prompt tokens"),
        (request("a", (259,)), "outside 0..258"),
        (request("a", (-1,)), "outside 0..258"),
        (request("a", (5,), 2, output=(5, 5)), "already has its 2 output tokens"),
    ],
)
def test_senseless_requests_are_refused(
    bad: GenerationRequest, says: str, make_engine: EngineFactory
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=says):
        engine.admit(bad)
    assert engine.free_blocks == 64


def test_one_request_is_in_an_engine_once(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(5)))
    with pytest.raises(ValueError, match="release it first"):
        engine.admit(request("a", prompt(5), attempt=1))


# Steps


def test_a_step_keeps_to_its_token_budget_and_decodes_first(make_engine: EngineFactory) -> None:
    engine = make_engine(step_tokens_max=50, running_max=4, speculation="off")
    engine.admit(request("decoding", prompt(10), 20))
    engine.step()
    engine.admit(request("long", prompt(130), 3))
    results = [engine.step() for _ in range(3)]
    assert [result.tokens_computed for result in results] == [50, 50, 33]
    assert all(tokens_of([result], "decoding") for result in results), "prefill does not starve decode"
    assert len(tokens_of(results, "long")) == 1


def test_prompts_share_a_step(make_engine: EngineFactory) -> None:
    engine = make_engine()
    for index in range(5):
        engine.admit(request(str(index), prompt(30 + index, seed=index), 2))
    assert engine.step().tokens_computed == sum(30 + index for index in range(5))


def test_a_step_without_work_is_empty(make_engine: EngineFactory) -> None:
    engine = make_engine()
    result = engine.step()
    assert (result.events, result.blocks, result.tokens_computed) == ((), (), 0)


def test_each_full_block_is_completed_exactly_once(make_engine: EngineFactory) -> None:
    engine = make_engine(step_tokens_max=45, running_max=2)
    engine.admit(request("a", prompt(100), 70))
    indices = [block.chain_index for result in run(engine) for block in result.blocks]
    assert indices == [0, 1, 2, 3, 4], "169 tokens are computed: the last one is drawn only"


@pytest.mark.parametrize("seed", range(3))
def test_slots_are_conserved_whatever_happens(seed: int, make_engine: EngineFactory) -> None:
    chance = random.Random(seed)
    engine = make_engine(pool_blocks=24, step_tokens_max=40, running_max=6)
    alive: set[str] = set()
    for turn in range(150):
        action = chance.random()
        if action < 0.35:
            wanted = request(str(turn), prompt(chance.randint(1, 150), seed=turn), chance.randint(1, 40))
            hold = chance.random() < 0.3
            if engine.can_admit(wanted, hold=hold):
                engine.admit(wanted, hold=hold)
                alive.add(wanted.request_id)
            else:
                with pytest.raises(OverLimit):
                    engine.admit(wanted, hold=hold)
        elif action < 0.45 and alive:
            engine.release(chance.choice(sorted(alive)))
        else:
            engine.step()
        engine.check_integrity()
    for name in alive:
        engine.release(name)
    assert engine.free_blocks == 24


def test_max_model_len_must_suit_model_and_pool(make_engine: EngineFactory) -> None:
    assert make_engine(pool_blocks=8).max_model_len == 8 * 32
    assert make_engine(pool_blocks=100).max_model_len == 2048
    assert make_engine(pool_blocks=8, max_model_len=2000).max_model_len == 8 * 32  # what never fits is told
    with pytest.raises(ConfigError, match="made for 2048"):
        make_engine(max_model_len=4096)
    with pytest.raises(ConfigError, match="raise pool_nbytes"):
        make_engine(pool_blocks=None, pool_nbytes=100)
