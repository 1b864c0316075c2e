"""The metadata of a GGUF file as config.json: what the model computes.

    general.architecture   llama (Mistral too), qwen2, qwen3; every other key starts with it
    <arch>.attention.*     heads, widths, window         -> as Hugging Face names them
    <arch>.rope.*          theta, scaling                -> rope_scaling; Llama 3's is a tensor of factors
    names of tensors       tied embeddings, biases

llama.cpp computes no window for these architectures, and its converter writes none; a file that names one is
taken at its word where that is enough (Mistral: all layers; Qwen: with a pattern of layers) and refused where
not. What a file says beyond what is computed here is refused by the key's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from engine.errors import ModelUnsupported
from engine.models.config import ModelConfig
from engine.models.rope import inverse_frequencies

__all__ = ["ARCHITECTURES", "ROPE_FREQS", "raw_config"]

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`general.architecture` -> config.json's. Mistral is stored as llama."""

ROPE_FREQS: Final = "rope_freqs.weight"
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3.x has. A GGUF keeps only the resulting factors: checked against these."""
_MUST_BE: Final[Mapping[str, tuple[Any, ...]]] = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.dimension_sections": (),
    "expert_count": (0,),
    "attention.scale": (),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (1.0,),
}
_YARN: Final = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Look-ups under one architecture's prefix."""

    reader: gguf.GGUFReader
    architecture: str
    path: Path

    def value(self, key: str) -> Any:
        return self.whole(f"{self.architecture}.{key}")

    def number(self, key: str) -> float | None:
        """GGUF keeps float32: the shortest decimal that means the same (1e-05, not 9.999999747378752e-06)."""
        found = self.value(key)
        return None if found is None else float(str(np.float32(found)))

    def whole(self, key: str) -> Any:
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def refuse(self, key: str, value: object, cure: str = "Use the model's safetensors form") -> None:
        raise ModelUnsupported(
            f"{self.path}: {self.architecture}.{key} = {value!r} is not supported in a GGUF file", cure
        )


def raw_config(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """config.json's content. Keys that are absent stay absent: ModelConfig names those it needs. Raises
    ModelUnsupported, and whatever malformed metadata raises."""
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES:
        raise ModelUnsupported(
            f"{path}: the GGUF architecture {architecture!r} is not supported",
            f"Use a GGUF of one of: {', '.join(ARCHITECTURES)} (SmolLM and Mistral are stored as llama)",
        )
    data = _Metadata(reader, architecture, path)
    for key, allowed in _MUST_BE.items():
        if (value := data.value(key)) is not None and value not in allowed:
            data.refuse(key, value)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    found = {
        "vocab_size": int(stored["token_embd.weight"].shape[-1]),
        "hidden_size": data.value("embedding_length"),
        "intermediate_size": data.value("feed_forward_length"),
        "num_hidden_layers": data.value("block_count"),
        "num_attention_heads": data.value("attention.head_count"),
        "num_key_value_heads": data.value("attention.head_count_kv"),
        "head_dim": _head_dim(data),
        "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": data.number("rope.freq_base"),
        "rope_scaling": _rope_scaling(data),
        "max_position_embeddings": data.value("context_length"),
        "bos_token_id": data.whole("tokenizer.ggml.bos_token_id"),
        "eos_token_id": data.whole("tokenizer.ggml.eos_token_id"),
        "pad_token_id": data.whole("tokenizer.ggml.padding_token_id"),
    }
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in stored,
        "torch_dtype": "float32",
        **{key: entry for key, entry in found.items() if entry is not None},
        **_window(data),
    }
    if architecture != "qwen2":  # it always has biases
        raw["attention_bias"] = "blk.0.attn_q.bias" in stored
    if ROPE_FREQS in stored:
        raw["rope_scaling"] = _llama3_scaling(raw, np.asarray(stored[ROPE_FREQS].data), path)
    return raw


def _head_dim(data: _Metadata) -> int:
    plain: int = data.value("embedding_length") // data.value("attention.head_count")
    rotated: int | None = data.value("rope.dimension_count")
    width: int = data.value("attention.key_length") or rotated or plain
    for key, value in (
        ("rope.dimension_count", rotated),
        ("attention.value_length", data.value("attention.value_length")),
    ):
        if value is not None and value != width:
            data.refuse(key, value)
    return width


def _window(data: _Metadata) -> dict[str, Any]:
    """What of config.json says which layers see a window only."""
    window = data.value("attention.sliding_window")
    if not window:
        return {}
    if data.architecture == "llama":
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": window,
        }
    pattern = data.value("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        data.refuse("attention.sliding_window", window)
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "layer_types": [kinds[bool(entry)] for entry in pattern],
    }


def _rope_scaling(data: _Metadata) -> dict[str, Any] | None:
    kind = data.value("rope.scaling.type") or "linear"
    factor = data.number("rope.scaling.factor") or data.number("rope.scale_linear")
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        said = {ours: data.number(f"rope.scaling.{theirs}") for theirs, ours in _YARN.items()}
        scaling |= {key: value for key, value in said.items() if value is not None}
    return scaling


def _llama3_scaling(raw: dict[str, Any], factors: npt.NDArray[np.float32], path: Path) -> dict[str, Any]:
    """Rope settings whose stretched frequencies are the file's: plain frequency / factor, pair by pair."""
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    plain = inverse_frequencies(ModelConfig.from_dict(raw, str(path)))
    stretched = inverse_frequencies(ModelConfig.from_dict(raw | {"rope_scaling": scaling}, str(path)))
    ours = (plain / stretched).numpy()
    if "rope_scaling" in raw or factors.shape != ours.shape or not np.allclose(factors, ours, rtol=1e-3):
        raise ModelUnsupported(
            f"{path} has rope frequency factors that are not Llama 3's", "Use the model's safetensors form"
        )
    return scaling
