"""Tiny GGUF files built in code, as llama.cpp's converter would make them of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from tests.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS, random_tensors, tiny_config

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = [
    *SPECIAL_TOKENS,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
]


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    quantised: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
    left_out: str = "",
    add_bos: bool = False,
    **overrides: Any,
) -> dict[str, torch.Tensor]:
    """Write the tiny model to `path`; its tensors under Hugging Face names, as they were before."""
    config = tiny_config(tie_word_embeddings=True, vocab_size=len(TOKENS), **overrides)
    tensors = random_tensors(config, seed=5)
    writer = gguf.GGUFWriter(path, architecture)
    _write_settings(writer, config)
    writer.add_rope_dimension_count(config["head_dim"])
    _write_tokenizer(writer, tokenizer, pre, add_bos)
    for name, tensor in tensors.items():
        theirs = gguf_name(name)
        if theirs != left_out:
            array = in_llama_cpp_order(name, tensor.numpy(), config)
            kind = quantised if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(theirs, gguf.quants.quantize(array, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_family_gguf(
    path: Path, model: PreTrainedModel, extra_settings: dict[str, float] | None = None
) -> None:
    """Write a model of tests/engine/models/family_models.py; its vocabulary must be TOKENS."""
    config: dict[str, Any] = model.config.to_dict()
    architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    _write_settings(writer, config)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    _write_rope_scaling(writer, config["rope_parameters"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
        if architecture != "llama":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    for key, value in (extra_settings or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    _write_tokenizer(writer, "gpt2", "smollm", add_bos=False)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        array = tensor.numpy()
        if architecture == "llama":
            array = in_llama_cpp_order(name, array, config)
        writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def in_llama_cpp_order(
    name: str, array: npt.NDArray[np.float32], config: dict[str, Any]
) -> npt.NDArray[np.float32]:
    """Row by row, from the rule's definition, so that a slip in the converter's reshape shows."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = next((config[key] for part, key in heads.items() if part in name), None)
    if kind is None:
        return array
    width = array.shape[0] // kind
    theirs = np.empty_like(array)
    for head in range(kind):
        for half in range(2):
            for pair in range(width // 2):
                theirs[head * width + 2 * pair + half] = array[head * width + half * width // 2 + pair]
    return theirs


def _write_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _write_rope_scaling(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, write in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                write(rope[key])


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: str, pre: str, add_bos: bool) -> None:
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in TOKENS])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)
