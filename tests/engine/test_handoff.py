"""Promise: KV that left one engine and entered another goes on there as if it had never moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.types import StepResult, TailKV
from kvstore.errors import CorruptBlock
from kvstore.frame import payload_checksum
from kvstore.nouns import MissReason
from tests.engine.conftest import EngineFactory, Logits, prompt, request, run, tokens_of


def payloads(results: Sequence[StepResult]) -> list[memoryview]:
    """Completed blocks in chain order, without a gap, as read-only bytes from a wire would be."""
    blocks = [block for result in results for block in result.blocks]
    assert [block.chain_index for block in blocks] == list(range(len(blocks)))
    return [memoryview(block.payload.tobytes()) for block in blocks]


def prefill(engine: Engine, length: int) -> tuple[list[memoryview], TailKV | None, int]:
    """What the prefill role does: blocks, tail and the first token; then the sequence is let go."""
    engine.admit(request("moved", prompt(length), 12, seed=1), hold=True)
    results = run(engine)
    tail = engine.take_tail("moved")
    engine.release("moved")
    assert engine.free_blocks == engine.config.pool_blocks
    (first,) = tokens_of(results, "moved")
    return payloads(results), tail, first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 256, 290])
def test_tokens_and_logits_go_on_bit_equal(
    length: int, dtype: str, make_engine: EngineFactory, seen_logits: Logits
) -> None:
    alone = make_engine(dtype=dtype, step_tokens_max=100)
    alone.admit(request("moved", prompt(length), 12, seed=1))
    expected = tokens_of(run(alone), "moved")
    logits = dict(seen_logits)
    seen_logits.clear()

    blocks, tail, first = prefill(make_engine(dtype=dtype, step_tokens_max=100), length)
    assert len(blocks) == length // 32
    assert (tail.tokens if tail else 0) == length % 32
    decode = make_engine(dtype=dtype)
    decode.admit(request("moved", prompt(length), 12, output=[first], seed=1), blocks=blocks, tail=tail)
    results = run(decode)

    assert results[0].tokens_computed == 1, "nothing that was handed over is computed again"
    assert [first, *tokens_of(results, "moved")] == expected
    assert all(torch.equal(seen_logits[key], logits[key]) for key in seen_logits)


def test_both_engines_complete_the_same_bytes(make_engine: EngineFactory) -> None:
    alone = make_engine()
    alone.admit(request("moved", prompt(70), 60))
    expected = payloads(run(alone))
    blocks, tail, first = prefill(make_engine(), 70)
    decode = make_engine()
    decode.admit(request("moved", prompt(70), 60, output=[first]), blocks=blocks, tail=tail)
    grown = [block for result in run(decode) for block in result.blocks]
    assert [block.chain_index for block in grown] == [2, 3], "onboarded blocks are not completed again"
    assert [*blocks, *(memoryview(block.payload.tobytes()) for block in grown)] == expected


def test_a_wholly_cached_prompt_computes_its_last_token(make_engine: EngineFactory) -> None:
    """So that there are logits to draw from; its block is not emitted a second time."""
    first = make_engine()
    first.admit(request("a", prompt(64), 4))
    results = run(first)
    again = make_engine()
    again.admit(request("a", prompt(64), 4), blocks=payloads(results)[:2])
    repeated = run(again)
    assert repeated[0].tokens_computed == 1
    assert not any(result.blocks for result in repeated)
    assert tokens_of(repeated, "a") == tokens_of(results, "a")


def test_a_partial_hit_computes_the_rest(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(100), 4))
    results = run(engine)
    engine.admit(request("b", prompt(100), 4), blocks=payloads(results)[:1])
    repeated = run(engine)
    assert repeated[0].tokens_computed == 68
    assert [block.chain_index for result in repeated for block in result.blocks] == [1, 2]
    assert tokens_of(repeated, "b") == tokens_of(results, "a")


def test_a_sampled_sequence_draws_the_same_tokens_elsewhere(make_engine: EngineFactory) -> None:
    def wanted(output: Sequence[int]) -> list[int]:
        engine = make_engine()
        engine.admit(request("a", prompt(40), 20, output=output, temperature=1.0, seed=7))
        return [*output, *tokens_of(run(engine), "a")]

    whole = wanted([])
    assert len(set(whole)) > 5
    assert wanted(whole[:1]) == wanted(whole[:13]) == whole


def test_a_damaged_tail_is_refused_and_takes_nothing(make_engine: EngineFactory) -> None:
    engine = make_engine()
    blocks, tail, first = prefill(engine, 40)
    assert tail is not None
    damaged = tail.payload.copy()
    damaged[17] ^= 1
    with pytest.raises(CorruptBlock) as refused:
        engine.admit(
            request("a", prompt(40), 4, output=[first]),
            blocks=blocks,
            tail=dataclasses.replace(tail, payload=damaged),
        )
    assert refused.value.reason is MissReason.CHECKSUM
    assert engine.free_blocks == 64
    engine.check_integrity()


def test_payloads_of_another_size_are_refused_and_take_nothing(make_engine: EngineFactory) -> None:
    engine = make_engine()
    short = np.zeros(engine.layout.block_nbytes - 1, dtype=np.uint8)
    with pytest.raises(ValueError, match="must have"):
        engine.admit(request("a", prompt(40), 4), blocks=[short])
    tail = TailKV(2, short, payload_checksum(short.data))
    with pytest.raises(ValueError, match="must have"):
        engine.admit(request("a", prompt(40), 4), tail=tail)
    with pytest.raises(ValueError, match="KV of 64 was given"):
        engine.admit(request("a", prompt(40), 4), blocks=[short, short])
    assert engine.free_blocks == 64
    engine.check_integrity()


def test_no_tail_where_none_is(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(32), 2), hold=True)
    run(engine)
    assert engine.take_tail("a") is None
    assert engine.take_tail("never admitted") is None


def test_onboarded_nonsense_ends_in_an_error_event(make_engine: EngineFactory) -> None:
    """NaN is a legal payload to a checksum: the sequence fails by name, the engine lives on."""
    engine = make_engine()
    nan = torch.full((engine.layout.block_nbytes // 4,), float("nan")).view(torch.uint8).numpy()
    engine.admit(request("bad", prompt(40), 4), blocks=[nan])
    engine.admit(request("good", prompt(40), 4))
    results = run(engine)
    (event,) = [event for result in results for event in result.events if event.request_id == "bad"]
    assert event.token_id == -1
    assert event.error is not None
    assert "not finite" in event.error
    assert len(tokens_of(results, "good")) == 4
    assert engine.free_blocks == 64
