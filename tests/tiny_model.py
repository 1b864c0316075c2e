"""A tiny random folder built in code: what tests use where a real model would only cost time.

`make_tiny_model(path)` writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json, in
the form the Hugging Face hub has them: about 0.3 MB, 10 ms; Llama, or by `architectures` Mistral or Qwen.
Equal arguments give equal bytes. The weights are drawn so wide (standard deviation 1 / sqrt(fan in),
embeddings a quarter and not tied) that every part of the model moves the logits and greedy output is not one
token over and over. The tokenizer is byte-level without merges: one token a byte, three special tokens,
ChatML template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, TURN_START, TURN_END)
VOCAB_SIZE: Final = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """config.json of the tiny model; `overrides` replace or add keys."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }
    return config | overrides


def make_tiny_model(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write the model into the folder `path` (made if absent) and return it.

    `seed` decides the weights alone; `overrides` are keys of config.json (`num_hidden_layers=3`).
    """
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**overrides)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(random_tensors(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path)
    return path


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under Hugging Face names, float32, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).div_(columns**0.5)

    def norm(width: int) -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(width, generator=generator)

    architecture = config["architectures"][0]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    embedding = torch.randn(config["vocab_size"], hidden, generator=generator) / 4
    tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm(hidden)
        tensors[prefix + "self_attn.q_proj.weight"] = matrix(query, hidden)
        tensors[prefix + "self_attn.k_proj.weight"] = matrix(key, hidden)
        tensors[prefix + "self_attn.v_proj.weight"] = matrix(key, hidden)
        tensors[prefix + "self_attn.o_proj.weight"] = matrix(hidden, query)
        tensors[prefix + "post_attention_layernorm.weight"] = norm(hidden)
        tensors[prefix + "mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[prefix + "mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[prefix + "mlp.down_proj.weight"] = matrix(hidden, inner)
        if architecture == "Qwen2ForCausalLM":
            for name, width in (("q", query), ("k", key), ("v", key)):
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = norm(width) - 1
        if architecture == "Qwen3ForCausalLM":
            for name in ("q", "k"):
                tensors[f"{prefix}self_attn.{name}_norm.weight"] = norm(config["head_dim"])
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def write_tokenizer(path: Path) -> None:
    """Special tokens take ids 0, 1, 2; the 256 bytes follow in the order of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": TURN_START,
        "eos_token": TURN_END,
        "unk_token": None,
        "pad_token": TURN_END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
