"""Digests of what lies in a folder: a model's weights, its tokenizer, an adapter. sha256, in threads.

Whatever decides KV bytes is in a digest by its content, never by its name. About 1 GB/s a core; a folder
without what a digest is made of is a ConfigError that says what to give instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.hashing import digest16

__all__ = [
    "Signature",
    "adapter_digest",
    "adapter_files",
    "adapter_signature",
    "files_digest",
    "tokenizer_digest",
    "weight_files",
]

Signature = tuple[tuple[str, int, int, int, int], ...]

THREADS_MAX: Final = 4
_TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "tekken.json",
)  # fmt: skip
_ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors", "new_embeddings.safetensors")


def files_digest(files: Iterable[Path]) -> bytes:
    """16 bytes over a model's files, as `weight_files` has them, each by its name. Raises OSError."""
    return digest16("kvstrata.vllm.files.1", *_named(files))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors and config.json. Raises ConfigError where there is no such folder or none in it."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise ConfigError(
            f"{folder} holds no safetensors to make a weights digest of: give weights_digest (32 hex digits) "
            "in kv_connector_extra_config, another one for other weights"
        )
    config = folder / "config.json"
    return [*files, config] if config.exists() else files


def tokenizer_digest(folder: Path) -> bytes:
    """16 bytes over the tokenizer's files. Raises ConfigError where there are none."""
    files = [path for name in _TOKENIZER_FILES if (path := folder / name).is_file()]
    if not files:
        raise ConfigError(
            f"{folder} holds no tokenizer's files: give tokenizer_digest (32 hex digits) in "
            "kv_connector_extra_config"
        )
    return digest16("kvstrata.vllm.tokenizer.1", *_named(files))


def adapter_digest(folder: Path) -> str:
    """32 hex digits. Raises OSError, and FileNotFoundError for a folder without an adapter's tensors."""
    files = adapter_files(folder)
    if not any(path.suffix == ".safetensors" for path in files):
        raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors")
    return digest16("kvstrata.vllm.adapter.1", *_named(files)).hex()


def adapter_signature(folder: Path) -> Signature:
    """Of an adapter's files: cheap, and another one when they were written, replaced or linked anew."""
    stats = [(path.name, path.stat()) for path in adapter_files(folder)]
    return tuple(
        (name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats
    )


def adapter_files(folder: Path) -> list[Path]:
    return [path for name in _ADAPTER_FILES if (path := folder / name).is_file()]


def _named(files: Iterable[Path]) -> list[str | bytes]:
    """Name and sha256 of each, in their order."""
    chosen = list(files)
    workers = max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)), len(chosen)))
    with ThreadPoolExecutor(workers, "kvstrata-digest") as threads:
        digests = list(threads.map(_sha256, chosen))
    parts: list[str | bytes] = []
    for path, digest in zip(chosen, digests, strict=True):
        parts += [path.name, digest]
    return parts


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
