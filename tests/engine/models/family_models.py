"""Tiny random models of every family, made and saved by transformers: what ours are held against.

A row of CASES names a family, what its config says beyond the tiny one, and so a part of it that could be
computed wrong. Weights are drawn wide, biases and norms too, so that each part moves the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny_model import VOCAB_SIZE, write_tokenizer

MODELS: Final[dict[str, tuple[Any, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LLAMA3: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: Final = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
WINDOW: Final = 70
SLIDING: Final = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
CASES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-deep": ("llama", {"num_hidden_layers": 5, "rms_norm_eps": 1e-6}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "mistral-window-of-tiles": ("mistral", {"sliding_window": 257}),
    "mistral-window-yarn": ("mistral", {"sliding_window": 33, "rope_parameters": YARN | {"mscale": 0.8}}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", SLIDING | {"num_hidden_layers": 3}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 32, "num_attention_heads": 6}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "qwen3-window": (
        "qwen3",
        SLIDING
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-yarn": (
        "qwen3",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}},
    ),
}


def family_config(name: str, **overrides: Any) -> Any:
    family, settings = CASES[name]
    tiny: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return MODELS[family][0](**(tiny | settings | overrides))


def family_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of CASES in float32. Its weights are drawn as tests/tiny_model.py draws them."""
    config = family_config(name, **overrides)
    model: PreTrainedModel = MODELS[CASES[name][0]][1](config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            drawn = torch.randn(tensor.shape, generator=generator)
            if tensor_name.endswith("norm.weight"):
                tensor.copy_(1 + 0.1 * drawn)
            elif tensor_name.endswith("bias"):
                tensor.copy_(0.3 * drawn)
            else:
                tensor.copy_(drawn / (4 if "embed" in tensor_name else tensor.shape[1] ** 0.5))
    return model


def save_family_model(model: PreTrainedModel, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def greedy(model: PreTrainedModel, tokens: tuple[int, ...], count: int) -> list[torch.Tensor]:
    """Logits of `count` tokens, each from the whole sequence so far: no cache to be wrong in."""
    ids, seen = list(tokens), []
    with torch.inference_mode():
        for _ in range(count):
            logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            seen.append(logits)
            ids.append(int(logits.argmax()))
    return seen
