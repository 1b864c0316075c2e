"""Promise: a model over two ranks says what one process says, and each rank's KV is its heads' alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.parallel.agreement import shares
from engine.prediction import OutputPrediction
from engine.types import CompletedBlock, GenerationRequest, StepResult
from tests.engine.conftest import Logits, prompt, request, run, tokens_of
from tests.engine.parallel.conftest import BLOCK_TOKENS, close, load

PROMPTS = [(3, 1), (17, 2), (40, 3), (8, 4), (90, 5), (61, 6)]


def with_steps_of(engine: Engine, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """An engine reads its step's bound anew for every plan."""
    monkeypatch.setattr(engine, "config", engine.config.model_copy(update={"step_tokens_max": tokens}))


def ask_all(engine: Engine, output: int = 20) -> list[StepResult]:
    for length, seed in PROMPTS:
        engine.admit(request(f"r{seed}", prompt(length, seed), output, seed=seed))
    return run(engine)


def drawn_from(engine: Engine, seen: Logits, length: int, output: int = 4, **admitted: Any) -> torch.Tensor:
    """Logits of each token drawn after a prompt, with whatever else is in the engine."""
    seen.clear()
    engine.admit(request("probe", prompt(length), output, seed=1), **admitted)
    run(engine)
    return torch.stack([seen[1, length + index] for index in range(output)])


# What it says


@pytest.mark.parametrize("step_tokens", [512, 23])
def test_tokens_are_those_of_one_process(
    step_tokens: int, one: Engine, two: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_steps_of(two, monkeypatch, step_tokens)
    expected, computed = ask_all(one), ask_all(two)
    for _, seed in PROMPTS:
        assert tokens_of(computed, f"r{seed}") == tokens_of(expected, f"r{seed}")


def test_logits_are_near_those_of_one_process(one: Engine, two: Engine, seen_logits: Logits) -> None:
    expected = drawn_from(one, seen_logits, 100)
    computed = drawn_from(two, seen_logits, 100)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)


def test_preempted_sequences_go_on_with_the_same_tokens(
    one: Engine, two: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputPrediction, "tokens", lambda _, known, longest: min(known + 1, longest))
    asked = [request(f"r{seed}", prompt(50, seed), 60) for seed in range(8)]
    expected = {}
    for each in asked:
        one.admit(each)
        expected[each.request_id] = tokens_of(run(one), each.request_id)
    waiting: list[GenerationRequest] = [*asked]
    results, preempted = [], 0
    while waiting or two.has_work():
        while waiting and two.can_admit(waiting[0]):
            two.admit(waiting.pop(0))
        results.append(two.step())
        preempted += len(results[-1].preempted)
        waiting += results[-1].preempted
    assert preempted > 0, "the pool was large enough for all: the test shows nothing"
    assert {name: tokens_of(results, name) for name in expected} == expected


def test_a_fork_writes_into_a_copy_in_every_rank(one: Engine, two: Engine) -> None:
    """The end of a prompt is one block of both sequences until each goes its way."""
    drawn = []
    for engine in (one, two):
        for name, seed in (("a", 1), ("b", 2)):
            engine.admit(request(name, prompt(21), 12, temperature=1.5, seed=seed))
        results = run(engine)
        drawn.append((tokens_of(results, "a"), tokens_of(results, "b")))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


# Bits


def test_neither_chunks_nor_company_move_a_bit(
    two: Engine, seen_logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = drawn_from(two, seen_logits, 290)
    for step_tokens in (16, 37, 129):
        with_steps_of(two, monkeypatch, step_tokens)
        assert torch.equal(drawn_from(two, seen_logits, 290), alone), step_tokens
    with_steps_of(two, monkeypatch, 90)
    for index in range(5):
        two.admit(request(f"other-{index}", prompt(3 + 7 * index, seed=index + 1), 8, seed=99))
    two.step()
    assert torch.equal(drawn_from(two, seen_logits, 290), alone)


# KV


def blocks_of(engine: Engine, length: int) -> list[CompletedBlock]:
    engine.admit(request("kv", prompt(length), 1))
    return [block for result in run(engine) for block in result.blocks]


def heads_of(engine: Engine, payload: memoryview, heads: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[layer][k, v][token][kv_head][head_dim]"""
    shape = (engine.layout.layers, 2, BLOCK_TOKENS, heads, engine.layout.head_dim)
    return np.frombuffer(payload, np.float32).reshape(shape)


def test_a_ranks_block_is_that_of_its_heads(one: Engine, two: Engine) -> None:
    assert [(layout.head_begin, layout.head_end) for layout in two.pool.layouts] == [(0, 1), (1, 2)]
    names = {layout.fingerprint for layout in (*two.pool.layouts, *one.pool.layouts)}
    assert len(names) == 3, "blocks of different heads could be taken for each other"
    whole, parted = blocks_of(one, 40), blocks_of(two, 40)
    assert [block.chain_index for block in parted] == [block.chain_index for block in whole] != []
    for expected, block in zip(whole, parted, strict=True):
        every_head = heads_of(one, expected.payload.data, 2)
        for layout, share in zip(two.pool.layouts, shares(block.payload, 2), strict=True):
            assert len(share) == layout.block_nbytes
            own = every_head[..., layout.head_begin : layout.head_end, :]
            np.testing.assert_allclose(heads_of(two, share, 1), own, rtol=0, atol=1e-5)


def test_onboarded_blocks_and_tail_give_the_same_bits(two: Engine, seen_logits: Logits) -> None:
    computed = drawn_from(two, seen_logits, 45)
    two.admit(request("a", prompt(45), 5), hold=True)
    blocks = [block.payload for result in run(two) for block in result.blocks]
    tail = two.take_tail("a")
    two.release("a")
    assert len(blocks) == 5
    assert tail is not None
    damage_every_free_slot(two)
    asked = request("b", prompt(45), 4, output=[int(computed[0].argmax())], seed=1)
    seen_logits.clear()
    two.admit(asked, blocks=blocks, tail=tail)
    results = run(two)
    assert results[0].tokens_computed == 1
    onboarded = torch.stack([seen_logits[1, 46 + index] for index in range(3)])
    assert torch.equal(onboarded, computed[1:])


def test_kv_of_one_rank_alone_is_refused(two: Engine) -> None:
    (block,) = blocks_of(two, BLOCK_TOKENS)
    with pytest.raises(ValueError, match="over 2 ranks"):
        two.admit(request("half", prompt(20), 1), blocks=[shares(block.payload, 2)[0]])


def damage_every_free_slot(engine: Engine) -> None:
    """With NaN in every rank, as whatever was there before might be."""
    blocks = engine.free_blocks - 1
    payload = torch.full((engine.pool.block_nbytes // 4,), float("nan")).view(torch.uint8).numpy()
    engine.admit(request("damage", prompt(blocks * BLOCK_TOKENS), 1), blocks=[payload] * blocks)
    engine.release("damage")


def test_codes_in_the_pool_are_every_ranks_own(tiny_folder: Path) -> None:
    """A lossy pool and another dtype over ranks: near the model, and a block's size as its layout says."""
    engine = load(tiny_folder, hot_pool="int8", dtype="bfloat16")
    try:
        blocks = blocks_of(engine, 40)
        assert {block.payload.nbytes for block in blocks} == {2 * engine.layout.block_nbytes}
        assert engine.pool.quality.name == "INT8"
    finally:
        close(engine)
