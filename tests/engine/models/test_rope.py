"""Inverse frequencies equal transformers' to the last bit, for every rope type we accept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.config import ModelConfig
from engine.models.rope import SUPPORTED_ROPE_TYPES, inverse_frequencies
from tests.tiny_model import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: list[tuple[float, dict[str, Any] | None]] = [
    (10000.0, None),
    (100000.0, {"rope_type": "default"}),
    (10000.0, {"rope_type": "linear", "factor": 2.5}),
    (500000.0, LLAMA3),
    (10000.0, LLAMA3 | {"original_max_position_embeddings": 128, "factor": 8.0}),
]


def test_the_cases_cover_every_supported_type() -> None:
    assert {"default" if s is None else s["rope_type"] for _, s in CASES} == set(SUPPORTED_ROPE_TYPES)


@pytest.mark.parametrize(("theta", "scaling"), CASES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_equal_to_transformers(theta: float, scaling: dict[str, Any] | None, head_dim: int) -> None:
    raw = tiny_config(
        rope_theta=theta, rope_scaling=scaling, head_dim=head_dim, max_position_embeddings=131072
    )
    ours = inverse_frequencies(ModelConfig.from_dict(raw, "here"))
    parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=131072,
            rope_parameters=parameters,
        )
    ).inv_freq
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
