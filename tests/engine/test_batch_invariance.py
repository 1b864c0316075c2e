"""Promise: in batch-invariant mode a token's logits are the same bits whatever was computed with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.registry import DEFAULT_MODEL, resolve_model
from tests.engine.conftest import EngineFactory, Logits, prompt, request, run
from tests.tiny_model import make_tiny_model

Threads = Callable[[int], None]
PROMPT = 330  # beyond one tile of the context
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "smollm2-like": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "one-kv-head": {"num_key_value_heads": 1},
    "no-groups": {"num_key_value_heads": 4, "intermediate_size": 100},
    "biases": {"architectures": ["Qwen2ForCausalLM"], "attention_bias": None},
    "windowed": {"architectures": ["MistralForCausalLM"], "sliding_window": 130},
    "some-windowed": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "sliding_window": 40,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
}


def final_logits(engine: Engine, seen: Logits, length: int = PROMPT, output: int = 4) -> list[torch.Tensor]:
    """Logits of each token drawn after a prompt, with whatever else is in the engine."""
    seen.clear()
    engine.admit(request("probe", prompt(length), output, seed=1))
    run(engine)
    return [seen[1, length + index] for index in range(output)]


def assert_equal_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(one, other), f"token {index} differs by up to {(one - other).abs().max()}"


@pytest.mark.parametrize(
    ("shape", "dtype", "threads"),
    [
        *((shape, "float32", 1) for shape in SHAPES),
        *((shape, "bfloat16", 1) for shape in ("smollm2-like", "one-kv-head", "some-windowed")),
        *((shape, "float16", 1) for shape in ("smollm2-like", "some-windowed")),
        *(("smollm2-like", dtype, 2) for dtype in ("float32", "bfloat16")),
    ],
)
def test_chunk_size_moves_no_bit(
    shape: str,
    dtype: str,
    threads: int,
    tmp_path: Path,
    make_engine: EngineFactory,
    seen_logits: Logits,
    set_threads: Threads,
) -> None:
    set_threads(threads)
    folder = make_tiny_model(tmp_path, **SHAPES[shape])
    whole = final_logits(make_engine(folder, dtype=dtype, step_tokens_max=PROMPT, running_max=1), seen_logits)
    for chunk in (16, 37, 129, 257):
        engine = make_engine(folder, dtype=dtype, step_tokens_max=chunk, running_max=1)
        assert_equal_bits(final_logits(engine, seen_logits), whole)


@pytest.mark.parametrize(
    ("shape", "length", "threads"), [("small", 265, 1), ("small", 20, 2), ("some-windowed", 320, 1)]
)
def test_token_by_token_equals_one_shot(
    shape: str,
    length: int,
    threads: int,
    tmp_path: Path,
    make_engine: EngineFactory,
    seen_logits: Logits,
    set_threads: Threads,
) -> None:
    set_threads(threads)
    folder = make_tiny_model(tmp_path, **SHAPES[shape])
    whole = final_logits(make_engine(folder, step_tokens_max=length, running_max=1), seen_logits, length)
    single = make_engine(folder, step_tokens_max=1, running_max=1)
    assert_equal_bits(final_logits(single, seen_logits, length), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "others", "threads"),
    [("small", 1, 1), ("small", 3, 1), ("small", 17, 1), ("small", 17, 2), ("some-windowed", 17, 1)],
)
def test_company_moves_no_bit(
    shape: str,
    others: int,
    threads: int,
    dtype: str,
    tmp_path: Path,
    make_engine: EngineFactory,
    seen_logits: Logits,
    set_threads: Threads,
) -> None:
    """Other sequences, some decoding and some in prefill, share every step."""
    set_threads(threads)
    folder = make_tiny_model(tmp_path, **SHAPES[shape])
    alone = final_logits(make_engine(folder, dtype=dtype, pool_blocks=256), seen_logits)
    engine = make_engine(folder, dtype=dtype, pool_blocks=256, step_tokens_max=90)
    for index in range(others):
        engine.admit(request(f"other-{index}", prompt(3 + 37 * index % 300, seed=index + 1), 8, seed=99))
    engine.step()
    assert_equal_bits(final_logits(engine, seen_logits), alone)


@pytest.mark.parametrize(
    ("shape", "dtype"), [("small", "float32"), ("small", "bfloat16"), ("some-windowed", "float32")]
)
def test_decoding_equals_prefilling_the_same_tokens(
    shape: str, dtype: str, tmp_path: Path, make_engine: EngineFactory, seen_logits: Logits
) -> None:
    """What decode computes one by one, a resumed attempt computes as a prompt: over a tile's boundary."""
    length, output = 250, 12
    folder = make_tiny_model(tmp_path, **SHAPES[shape])
    decoded = final_logits(make_engine(folder, dtype=dtype), seen_logits, length, output)
    tokens = [int(logits.argmax()) for logits in decoded]
    for known in (1, 5, 6, 7, output - 1):
        seen_logits.clear()
        engine = make_engine(folder, dtype=dtype)
        engine.admit(request("again", prompt(length), output, output=tokens[:known], seed=1))
        run(engine)
        resumed = [seen_logits[1, length + index] for index in range(known, output)]
        assert_equal_bits(resumed, decoded[known:])


def test_scattered_slots_equal_adjacent_ones(make_engine: EngineFactory, seen_logits: Logits) -> None:
    adjacent = final_logits(make_engine(), seen_logits)
    engine = make_engine(pool_blocks=33)
    for index in range(33):
        engine.admit(request(f"one-block-{index}", prompt(32), 1, seed=2))
    for index in range(0, 33, 2):
        engine.release(f"one-block-{index}")
    assert_equal_bits(final_logits(engine, seen_logits), adjacent)


def test_what_a_slot_held_before_does_not_matter(make_engine: EngineFactory, seen_logits: Logits) -> None:
    clean = final_logits(make_engine(), seen_logits)
    engine = make_engine(pool_blocks=40)
    poison(engine)
    assert_equal_bits(final_logits(engine, seen_logits), clean)


def poison(engine: Engine) -> None:
    """Fill all slots but the last with NaN, by onboarding it into a sequence and letting that go."""
    payload = torch.full((engine.layout.block_nbytes // 4,), float("nan")).view(torch.uint8).numpy()
    blocks = engine.free_blocks - 1
    engine.admit(request("poison", prompt(blocks * 32), 1), blocks=[payload] * blocks)
    engine.release("poison")


def test_thread_count_moves_no_bit(
    make_engine: EngineFactory, seen_logits: Logits, set_threads: Threads
) -> None:
    """Workers of one fleet may have different cores. Measured for 1 and 2 threads."""
    set_threads(1)
    one = final_logits(make_engine(), seen_logits)
    set_threads(2)
    assert_equal_bits(final_logits(make_engine(), seen_logits), one)


def test_the_plain_mode_is_near_but_not_equal(make_engine: EngineFactory, seen_logits: Logits) -> None:
    """The other way to compute the same; and the proof that this file's comparison can fail."""
    invariant = final_logits(make_engine(), seen_logits)
    plain = final_logits(make_engine(batch_invariant=False), seen_logits)
    for one, other in zip(invariant, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(one, other) for one, other in zip(invariant, plain, strict=True))


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("float32", 2), ("bfloat16", 2)])
def test_the_real_model_is_batch_invariant(
    dtype: str, threads: int, make_engine: EngineFactory, seen_logits: Logits, set_threads: Threads
) -> None:
    set_threads(threads)
    folder = resolve_model(DEFAULT_MODEL)
    length = 290
    whole = final_logits(make_engine(folder, dtype=dtype, step_tokens_max=length), seen_logits, length)
    chunked = make_engine(folder, dtype=dtype, step_tokens_max=137)
    assert_equal_bits(final_logits(chunked, seen_logits, length), whole)
    for index in range(4):
        chunked.admit(request(f"other-{index}", prompt(9 + 50 * index, seed=index), 20, seed=99))
    chunked.step()
    assert_equal_bits(final_logits(chunked, seen_logits, length), whole)
