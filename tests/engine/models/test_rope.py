"""Inverse frequencies and scaling equal transformers' to the last bit, for every rope type we accept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.config import ModelConfig
from engine.models.rope import SUPPORTED_ROPE_TYPES, attention_factor, inverse_frequencies
from tests.tiny_model import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: list[tuple[float, dict[str, Any] | None]] = [
    (10000.0, None),
    (100000.0, {"rope_type": "default"}),
    (10000.0, {"rope_type": "linear", "factor": 2.5}),
    (500000.0, LLAMA3),
    (10000.0, LLAMA3 | {"original_max_position_embeddings": 128, "factor": 8.0}),
    (1000000.0, YARN),
    (10000.0, YARN | {"original_max_position_embeddings": 4096, "factor": 32.0}),
    (10000.0, YARN | {"factor": 1.0}),
    (10000.0, YARN | {"factor": 7, "mscale": 0.707, "mscale_all_dim": 1.3}),
    (10000.0, YARN | {"mscale": 0.707}),
    (10000.0, YARN | {"attention_factor": 1.17}),
    (150000.0, YARN | {"beta_fast": 48, "beta_slow": 2.5, "truncate": False}),
    (10000.0, YARN | {"beta_fast": 0, "beta_slow": None}),
    (10000.0, YARN | {"original_max_position_embeddings": 4, "factor": 3.3}),
    (10000.0, {"rope_type": "yarn", "factor": 2.0}),
    (10000.0, YARN | {"factor": None}),
]


def test_the_cases_cover_every_supported_type() -> None:
    assert {"default" if s is None else s["rope_type"] for _, s in CASES} == set(SUPPORTED_ROPE_TYPES)


@pytest.mark.parametrize(("theta", "scaling"), CASES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_equal_to_transformers(theta: float, scaling: dict[str, Any] | None, head_dim: int) -> None:
    raw = tiny_config(
        rope_theta=theta, rope_scaling=scaling, head_dim=head_dim, max_position_embeddings=131072
    )
    config = ModelConfig.from_dict(raw, "here")
    ours = inverse_frequencies(config)
    parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=131072,
            rope_parameters=parameters,
        )
    )
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs.inv_freq)
    assert attention_factor(config) == theirs.attention_scaling


def test_an_original_context_beside_the_scaling_wins() -> None:
    """As transformers has it."""
    raw = tiny_config(rope_scaling=YARN, original_max_position_embeddings=64)
    scaling = ModelConfig.from_dict(raw, "here").rope_scaling
    assert scaling is not None
    assert scaling["original_max_position_embeddings"] == 64


def test_equivalent_settings_are_one_config() -> None:
    """And so one digest: what the config leaves out is filled in."""
    said = YARN | {"beta_fast": 32.0, "beta_slow": 1, "attention_factor": 0.1 * math.log(4.0) + 1}
    silent, loud = (
        ModelConfig.from_dict(tiny_config(rope_scaling=scaling), "here") for scaling in (YARN, said)
    )
    assert silent == loud
