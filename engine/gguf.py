"""A GGUF file (llama.cpp's format) as a Hugging Face style folder, dequantised to float32.

    metadata  <arch>.*     -> config.json, generation_config.json         (gguf_config.py)
              tokenizer.*  -> tokenizer.json, tokenizer_config.json       (gguf_tokenizer.py)
    tensors   blk.N.*      -> model.safetensors under Hugging Face names

Of a llama (and so of a Mistral) it stores the rows of Q and K, and their biases, so that the two halves of
a rotary pair lie side by side; Hugging Face has first all first halves, then all second ones. Per head of
width d that is

    ours[half * d/2 + pair] = theirs[2 * pair + half]

and must be undone, or attention is noise; Qwen's rows lie as they did. For 135M parameters about 3 s to
parse the 50k tokens (the `gguf` package reads them one by one) and as long to write; memory: one tensor.
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
from engine.gguf_config import ROPE_FREQS, raw_config
from engine.gguf_tokenizer import write_tokenizer
from engine.models.config import ModelConfig
from engine.progress import Progress
from engine.safetensors_file import write_float32
from engine.weights import EMBEDDING, LM_HEAD, SAFETENSORS_FILE, expected_shapes

__all__ = ["GGUF_MAGIC", "GgufModel"]

GGUF_MAGIC: Final = b"GGUF"
_WHOLE: Final = {
    EMBEDDING: "token_embd.weight",
    LM_HEAD: "output.weight",
    "model.norm.weight": "output_norm.weight",
}
_PER_LAYER: Final = {
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
_PAIRED: Final = ("llama", "mistral")
"""Families whose rows of Q and K llama.cpp has in another order."""
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
            raw = raw_config(reader, path)
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
        for name in sorted(stored.keys() - set(names.values()) - {ROPE_FREQS}):
            raise ModelUnsupported(
                f"{self.path} holds a tensor {name}, which no {self.config.model_type} model has",
                "Use a plain GGUF of its family (no experts or adapters)",
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
            if self.config.model_type in _PAIRED and "q_proj" in name:
                array = rows_from_llama_cpp(array, self.config.heads)
            elif self.config.model_type in _PAIRED and "k_proj" in name:
                array = rows_from_llama_cpp(array, self.config.kv_heads)
            yield array


def rows_from_llama_cpp(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a Q or K projection, [heads * d, in], or its bias [heads * d], from llama.cpp's order into
    Hugging Face's."""
    pairs = array.reshape(heads, len(array) // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _gguf_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face name -> name in the file."""
    return {ours: _gguf_name(ours) for ours in expected_shapes(config)}


def _gguf_name(ours: str) -> str:
    if ours in _WHOLE:
        return _WHOLE[ours]
    _, _, layer, rest = ours.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_PER_LAYER[part]}.{kind}"


def _truncated(path: Path, error: BaseException) -> ModelCorrupt:
    return ModelCorrupt(
        f"{path} is not a whole GGUF file ({error})", "The file is incomplete or damaged: fetch it again"
    )
