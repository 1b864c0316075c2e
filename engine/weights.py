"""A model's weights: safetensors, memory-mapped, checked against the config, with the digest that names them.

Tensors stay views of the mapped file when no cast is needed, so that workers on one host share one copy
of the page cache. The digest is what binds KV to weights (an epoch): sha256 of every tensor in parallel
threads, then sha256 over those in the order of names. Measured on 2 cores: 538 MB (135M parameters in
float32) in 0.2 to 0.4 s.

A file replaced by rename while mapped is harmless; one truncated in place under a running worker is not
(SIGBUS): model folders are immutable once made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from engine.folder import read_json_object
from engine.models.config import ModelConfig
from kvstore.nouns import WEIGHTS_DIGEST_NBYTES, WeightsDigest

__all__ = [
    "DTYPES",
    "EMBEDDING",
    "LM_HEAD",
    "SAFETENSORS_FILE",
    "Weights",
    "expected_shapes",
    "load_weights",
    "open_weights",
]

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names of `kvstore.nouns.DTYPE_NBYTES` -> torch's."""

SAFETENSORS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"
_DIGEST_TAG: Final = b"kvstrata.weights.1\0"
_FETCH_AGAIN: Final = "The file is incomplete or damaged: fetch the model again"


Share = Callable[[str, torch.Tensor], torch.Tensor]
"""Of a tensor, by its name, the part that one rank computes with."""


def _whole(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors under Hugging Face names, on the CPU, in the compute dtype, read-only by agreement.

    `lm_head.weight` is always there; with tied embeddings it is the embedding itself.
    """

    tensors: dict[str, torch.Tensor]
    digest: WeightsDigest  # of the whole model, also where `tensors` are one rank's share
    folder: Path | None = None  # where other ranks read their shares


def load_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, share: Share = _whole) -> Weights:
    """Map, check, digest and (if stored in another dtype) cast the weights of a model folder; of each tensor
    what `share` keeps of it.

    Raises ModelNotFound if there are no safetensors, ModelCorrupt for a truncated file or a tensor that is
    missing or of another shape (named), ModelUnsupported for tensors the runner would ignore.
    """
    stored = open_weights(folder, config)
    digest = _digest(stored, config, dtype)
    tensors = {name: share(name, tensor).to(dtype) for name, tensor in stored.items()}
    if config.tie_word_embeddings:
        tensors[LM_HEAD] = tensors[EMBEDDING]
    return Weights(tensors, digest, folder)


def weights_digest(folder: Path, config: ModelConfig, dtype: torch.dtype) -> WeightsDigest:
    """What an engine in that dtype would name them. Reads them once; raises what `load_weights` raises."""
    return _digest(open_weights(folder, config), config, dtype)


def open_weights(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The mapped tensors as stored, checked against the config. Milliseconds: no weight is read.

    Raises what `load_weights` raises, so a folder can be judged before anything is started on it.
    """
    stored = _open_all(folder)
    _check(stored, expected_shapes(config), folder, config)
    return stored


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a checkpoint must hold ([out, in] for matrices)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (query, hidden),
            prefix + "self_attn.k_proj.weight": (key, hidden),
            prefix + "self_attn.v_proj.weight": (key, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, query),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
        widths = {"q": query, "k": key, "v": key, "o": hidden}
        shapes |= {f"{prefix}self_attn.{name}_proj.bias": (widths[name],) for name in config.biased}
        if config.query_key_norm:
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (config.head_dim,) for name in ("q", "k")}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def _open_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor by name. Nothing is read yet but the headers."""
    stored: dict[str, torch.Tensor] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                stored |= {name: handle.get_tensor(name) for name in sorted(handle.keys())}
        except FileNotFoundError:
            raise ModelNotFound(
                f"{file.name} is missing from {folder} though its index names it", "Fetch the model again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise ModelCorrupt(f"{file} is not a whole safetensors file ({error})", _FETCH_AGAIN) from error
    return stored


def _files(folder: Path) -> Iterator[Path]:
    if (folder / SAFETENSORS_FILE).exists():
        yield folder / SAFETENSORS_FILE
        return
    if not (folder / INDEX_FILE).exists():
        raise _no_weights(folder)
    weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(name, str) or name != Path(name).name for name in names):
        raise ModelCorrupt(f"{folder / INDEX_FILE} has no weight_map of plain file names", _FETCH_AGAIN)
    yield from (folder / name for name in sorted(names))


def _no_weights(folder: Path) -> ModelNotFound | ModelUnsupported:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if pickled:
        return ModelUnsupported(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when read",
            "Take the model's safetensors form, or convert it with its own tools",
        )
    return ModelNotFound(f"there is no {SAFETENSORS_FILE} in {folder}", "Fetch the model again")


def _check(
    stored: dict[str, torch.Tensor],
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
    config: ModelConfig,
) -> None:
    """Hold the stored tensors against the config; drops those that carry no information of their own."""
    for name, shape in expected.items():
        tensor = stored.get(name)
        if tensor is None:
            raise ModelCorrupt(f"tensor {name} is missing from {folder}", _FETCH_AGAIN)
        if tuple(tensor.shape) != shape:
            raise ModelCorrupt(
                f"tensor {name} of {folder} has shape {list(tensor.shape)}, config.json says {list(shape)}",
                "config.json and weights are of different models: fetch both again",
            )
        if tensor.dtype not in DTYPES.values():
            raise ModelUnsupported(
                f"tensor {name} of {folder} is stored as {tensor.dtype}",
                f"Use weights stored as one of: {', '.join(DTYPES)}",
            )
    for name in sorted(stored.keys() - expected.keys()):
        if not (name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and config.tie_word_embeddings)):
            raise ModelUnsupported(
                f"tensor {name} of {folder} is not one a {config.model_type} model has: it would be ignored",
                "Use a plain model of its family (no adapters or extra heads)",
            )
        del stored[name]


def _digest(stored: Mapping[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype) -> WeightsDigest:
    """16 bytes over all that decides KV: compute dtype, rope, windows, the settings that shapes do not show,
    then per name in order (biases and the norms of heads among them): name, stored dtype, shape, sha256 of
    the stored bytes. One canonical JSON line; what a model lacks is not in it, so that its digest stays."""
    names = sorted(stored)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8), "weights-digest") as threads:
        hashes = list(threads.map(lambda name: _sha256_of(stored[name]), names))
    rows = [
        [name, str(stored[name].dtype), list(stored[name].shape), sha.hex()]
        for name, sha in zip(names, hashes, strict=True)
    ]
    identity = {
        "dtype": str(dtype),
        "heads": [config.heads, config.kv_heads, config.head_dim],
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "tensors": rows,
    }
    if any(config.windows):
        identity["windows"] = config.windows
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return WeightsDigest(hashlib.sha256(_DIGEST_TAG + text.encode()).digest()[:WEIGHTS_DIGEST_NBYTES])


def _sha256_of(tensor: torch.Tensor) -> bytes:
    """Of the bytes as stored. hashlib lets go of the interpreter lock, so threads run side by side."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).digest()
