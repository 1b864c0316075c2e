"""A GGUF file (llama.cpp's format) as a Hugging Face style folder, dequantised to float32.

    metadata  llama.*      -> config.json, generation_config.json
              tokenizer.*  -> tokenizer.json, tokenizer_config.json       (gguf_tokenizer.py)
    tensors   blk.N.*      -> model.safetensors under Hugging Face names

llama.cpp stores the rows of Q and K so that the two halves of a rotary pair lie side by side; Hugging Face
has first all first halves, then all second ones. Per head of width d that is

    ours[half * d/2 + pair] = theirs[2 * pair + half]

and must be undone, or attention is noise. For 135M parameters about 3 s to parse the 50k tokens (the
`gguf` package reads them one by one) and as long to write; memory: one tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import gguf
import numpy as np
import numpy.typing as npt

from engine.errors import ModelCorrupt, ModelError, ModelUnsupported
from engine.folder import CONFIG_FILE
from engine.gguf_tokenizer import write_tokenizer
from engine.models.config import ModelConfig
from engine.models.rope import inverse_frequencies
from engine.progress import Progress
from engine.safetensors_file import write_float32
from engine.weights import EMBEDDING, LM_HEAD, SAFETENSORS_FILE, expected_shapes

__all__ = ["GGUF_MAGIC", "GgufModel"]

GGUF_MAGIC: Final = b"GGUF"
ARCHITECTURE: Final = "llama"
_OUTPUT: Final = "output.weight"
_ROPE_FREQS: Final = "rope_freqs.weight"
_WHOLE: Final = {EMBEDDING: "token_embd.weight", LM_HEAD: _OUTPUT, "model.norm.weight": "output_norm.weight"}
_PER_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3.x has. A GGUF keeps only the resulting factors: checked against these."""
_MALFORMED: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
)
"""What the reader lets out for files that are cut short or not GGUF."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """An opened file, its metadata checked, its tensors still on disk."""

    path: Path
    raw_config: dict[str, Any]
    config: ModelConfig
    _reader: gguf.GGUFReader

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map and check a file. Raises ModelCorrupt or ModelUnsupported."""
        try:
            reader = gguf.GGUFReader(path)
            raw = _raw_config(reader, path)
        except ModelError:
            raise
        except _MALFORMED as error:
            raise _truncated(path, error) from error
        config = ModelConfig.from_dict(raw, str(path))
        return cls(path, raw, config, reader)

    @property
    def converted_nbytes(self) -> int:
        """Bytes of model.safetensors after conversion; the other files have a few MB."""
        return 4 * sum(math.prod(shape) for shape in expected_shapes(self.config).values())

    def write_folder(self, folder: Path, progress: Progress) -> None:
        """Write the whole model into an existing empty folder. Raises ModelError or OSError (disk full);
        what was written then is the caller's to remove."""
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        names = _gguf_names(self.config)
        for name in sorted(stored.keys() - set(names.values()) - {_ROPE_FREQS}):
            raise ModelUnsupported(
                f"{self.path} holds a tensor {name}, which no Llama model has",
                "Use a plain Llama-family GGUF (no experts, biases or adapters)",
            )
        write_json(folder / CONFIG_FILE, self.raw_config)
        generation: dict[str, Any] = {
            key: self.raw_config[key] for key in ("bos_token_id", "eos_token_id") if key in self.raw_config
        }
        write_json(folder / "generation_config.json", generation)
        write_tokenizer(self._reader, folder, self.path, self.config.max_position_embeddings)
        shapes = expected_shapes(self.config)
        try:
            write_float32(folder / SAFETENSORS_FILE, shapes, self._arrays(shapes, names, stored), progress)
        except OSError:
            raise
        except _MALFORMED as error:
            raise _truncated(self.path, error) from error

    def _arrays(
        self, shapes: dict[str, tuple[int, ...]], names: dict[str, str], stored: dict[str, Any]
    ) -> Iterator[npt.NDArray[np.float32]]:
        for name in shapes:
            tensor = stored.get(names[name])
            if tensor is None:
                raise ModelCorrupt(f"tensor {names[name]} is missing from {self.path}", "Fetch it again")
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if name.endswith("q_proj.weight"):
                array = rows_from_llama_cpp(array, self.config.heads)
            elif name.endswith("k_proj.weight"):
                array = rows_from_llama_cpp(array, self.config.kv_heads)
            yield array


def rows_from_llama_cpp(matrix: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a Q or K projection, [heads * d, in], from llama.cpp's order into Hugging Face's."""
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _gguf_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face name -> name in the file."""
    names = {ours: theirs for ours, theirs in _WHOLE.items() if ours in expected_shapes(config)}
    for layer in range(config.layers):
        for ours, theirs in _PER_LAYER.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return names


def _raw_config(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """config.json's content. Keys that are absent stay absent: ModelConfig names those it needs."""
    fields = reader.fields
    architecture = fields["general.architecture"].contents()
    if architecture != ARCHITECTURE:
        raise ModelUnsupported(
            f"{path}: the GGUF architecture {architecture!r} is not supported",
            f"Use a GGUF of the architecture {ARCHITECTURE!r} (Llama, SmolLM, SmolLM2)",
        )

    def value(key: str) -> Any:
        field = fields.get(key)
        return None if field is None else field.contents()

    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads, hidden = value("llama.attention.head_count"), value("llama.embedding_length")
    head_dim = value("llama.attention.key_length") or value("llama.rope.dimension_count") or hidden // heads
    found = {
        "vocab_size": int(stored["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(value("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(value("llama.rope.freq_base")),
        "max_position_embeddings": value("llama.context_length"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": _OUTPUT not in stored,
        "torch_dtype": "float32",
        **{key: entry for key, entry in found.items() if entry is not None},
    }
    kind = value("llama.rope.scaling.type")
    if kind not in (None, "none"):
        raw["rope_scaling"] = {"rope_type": kind, "factor": value("llama.rope.scaling.factor")}
    if _ROPE_FREQS in stored:
        raw["rope_scaling"] = _llama3_scaling(raw, np.asarray(stored[_ROPE_FREQS].data), path)
    return raw


def _llama3_scaling(raw: dict[str, Any], factors: npt.NDArray[np.float32], path: Path) -> dict[str, Any]:
    """Rope settings whose stretched frequencies are the file's: plain frequency / factor, pair by pair."""
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    plain = inverse_frequencies(ModelConfig.from_dict(raw, str(path)))
    stretched = inverse_frequencies(ModelConfig.from_dict(raw | {"rope_scaling": scaling}, str(path)))
    ours = (plain / stretched).numpy()
    if factors.shape != ours.shape or not np.allclose(factors, ours, rtol=1e-3):
        raise ModelUnsupported(
            f"{path} has rope frequency factors that are not Llama 3's", "Use the model's safetensors form"
        )
    return scaling


def _shortest(number: float | None) -> float | None:
    """GGUF keeps float32: the shortest decimal that means the same (1e-05, not 9.999999747378752e-06)."""
    return None if number is None else float(str(np.float32(number)))


def _truncated(path: Path, error: BaseException) -> ModelCorrupt:
    return ModelCorrupt(
        f"{path} is not a whole GGUF file ({error})", "The file is incomplete or damaged: fetch it again"
    )
