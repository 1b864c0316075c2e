"""Promise: the forward pass is the model's own: logits and greedy output equal transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.engine import Engine
from tests.engine.conftest import EngineFactory, Logits, prompt, request, run, tokens_of
from tests.tiny_model import make_tiny_model, random_tensors, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 32},
    "deep": {"num_hidden_layers": 5},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-6},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3-rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
}


def reference(overrides: dict[str, Any]) -> LlamaForCausalLM:
    raw = tiny_config(**overrides)
    tensors = random_tensors(raw)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model = LlamaForCausalLM(LlamaConfig(**raw))
    model.load_state_dict(tensors)
    return model.eval()


def greedy(model: LlamaForCausalLM, tokens: tuple[int, ...], count: int) -> list[torch.Tensor]:
    """Logits of `count` tokens, each from the whole sequence so far: no cache to be wrong in."""
    ids, seen = list(tokens), []
    with torch.inference_mode():
        for _ in range(count):
            logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
            seen.append(logits)
            ids.append(int(logits.argmax()))
    return seen


def generated(engine: Engine, tokens: tuple[int, ...], count: int) -> list[int]:
    engine.admit(request("probe", tokens, count, seed=1))
    return tokens_of(run(engine), "probe")


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(
    variant: str,
    batch_invariant: bool,
    tmp_path: Path,
    make_engine: EngineFactory,
    seen_logits: Logits,
) -> None:
    folder = make_tiny_model(tmp_path, **VARIANTS[variant])
    engine = make_engine(folder, batch_invariant=batch_invariant, step_tokens_max=100)
    expected = greedy(reference(VARIANTS[variant]), prompt(290), 10)
    tokens = generated(engine, prompt(290), 10)
    for index, logits in enumerate(expected):
        torch.testing.assert_close(seen_logits[1, 290 + index], logits, rtol=1e-4, atol=1e-4)
    assert tokens == [int(logits.argmax()) for logits in expected]


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_bfloat16_stays_near_float32(
    batch_invariant: bool, make_engine: EngineFactory, seen_logits: Logits
) -> None:
    """It works and is coarse; that its bits do not depend on the batch is not promised."""
    generated(make_engine(), prompt(290), 1)
    exact = seen_logits.pop((1, 290))
    generated(make_engine(dtype="bfloat16", batch_invariant=batch_invariant), prompt(290), 1)
    coarse = seen_logits[1, 290]
    assert coarse.dtype == torch.float32
    assert (coarse - exact).norm() < 0.05 * exact.norm()
