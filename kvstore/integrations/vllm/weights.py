"""What an engine's weights are called: a digest of the files, or one that was given, and of how vLLM runs it.

Other weights under one name would be wrong hits, so the name has in it whatever makes other KV of the same
tokens: quantization, overrides, and the model's settings as vLLM has resolved them, wherever it read them. A
given digest alone is the name where nothing of that is set: then the name is our own engine's. Where nobody
can say that the files are still those which vLLM has read, the name is a random one, which nobody shares.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from kvstore.errors import ConfigError
from kvstore.hashing import digest16
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.integrations.vllm.file_digests import files_digest, weight_files
from kvstore.integrations.vllm.file_times import newer_than_process
from kvstore.integrations.vllm.model_folder import folder_of
from kvstore.nouns import WEIGHTS_DIGEST_NBYTES, WeightsDigest

__all__ = ["weights_of"]

_OF_NO_TENSOR: Final = frozenset({"transformers_version"})
"""Fields of a resolved config.json that say who wrote it; so do those that begin with an underscore."""

log = structlog.get_logger(__name__)


def weights_of(vllm_config: Any, config: ConnectorConfig) -> Callable[[], WeightsDigest]:
    """What makes the digest of the engine's weights, which may take a second a gigabyte.

    Raises ConfigError at once where nobody but the user can say what they are. What is returned raises it
    where the files are not those of `files_digest`.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    how, is_plain = _how_they_run(model, str(load.load_format))
    given = bytes.fromhex(config.weights_digest) if config.weights_digest is not None else None
    if given is None:
        _refuse_unnamed(model, load, config)
    elif not is_plain:
        given = digest16("kvstrata.vllm.given.1", given, *how)
    if given is not None and config.files_digest is None:
        named = WeightsDigest(given)
        return lambda: named
    commit = getattr(getattr(model, "hf_config", None), "_commit_hash", None)
    folder = folder_of(str(model.model), commit or model.revision)
    if config.epoch == "weights":
        weight_files(folder)  # refused now, and not when somebody asks
    # The hub's cache keeps files under their content's names: what vLLM itself has fetched is what it read.
    is_fixed = not Path(str(model.model)).is_dir()
    expected = config.files_digest
    return lambda: _digest(folder, is_fixed, expected, given, how)


def _digest(
    folder: Path, is_fixed: bool, expected: str | None, given: bytes | None, how: tuple[str, ...]
) -> WeightsDigest:
    files = weight_files(folder)
    found = files_digest(files)
    if expected is not None and found.hex() != expected:
        raise ConfigError(
            f"the files in {folder} are not those of files_digest (theirs is {found.hex()}): print the "
            "settings again with `kvstrata vllm-config`, and restart vLLM with them"
        )
    newer = None if is_fixed else newer_than_process(files)  # after they were read for the digest, too
    if newer is not None:
        log.warning(
            "KV of this engine is shared with nobody, since nobody can say which weights it has: "
            "their files changed after it was started. Restart it",
            changed=str(newer),
        )
        return WeightsDigest(secrets.token_bytes(WEIGHTS_DIGEST_NBYTES))
    return WeightsDigest(given if given is not None else digest16("kvstrata.vllm.weights.2", *how, found))


def _refuse_unnamed(model: Any, load: Any, config: ConnectorConfig) -> None:
    why = None
    if str(load.load_format) == "dummy":
        why = "the weights are dummies, whose files do not say what they are"
    elif callable(getattr(model, "hf_overrides", None)):
        why = "hf_overrides is a function"
    if why is not None and config.epoch == "weights":
        raise ConfigError(
            f"{why}: give weights_digest (32 hex digits) in kv_connector_extra_config, another one for other "
            "weights"
        )


def _how_they_run(model: Any, load_format: str) -> tuple[tuple[str, ...], bool]:
    """All that makes KV of the weights' bytes, and whether none of it was asked for."""
    overrides = getattr(model, "hf_overrides", None) or {}
    resolved = _resolved(getattr(model, "hf_config", None))
    config_format = getattr(model, "config_format", "auto")
    asked_for = {
        "quantization": str(getattr(model, "quantization", None) or ""),
        "quantization_config": _text(getattr(model, "quantization_config", None)),
        "hf_overrides": "a function" if callable(overrides) else _text(overrides),
        "hf_config_path": "elsewhere" if getattr(model, "hf_config_path", None) else "",
        "config_format": str(getattr(config_format, "value", config_format)).replace("auto", "hf"),
        "classes": _text(getattr(model, "model_class_overrides", None)),
        "windows": "ignored" if getattr(model, "disable_sliding_window", False) else "",
        "load_format": load_format if load_format == "dummy" else "",
        "rope": ",".join(sorted(set(_long_ropes(resolved, getattr(model, "max_model_len", 0))))),
    }
    is_plain = not any(value for name, value in asked_for.items() if name != "config_format")
    is_plain = is_plain and asked_for["config_format"] == "hf"
    dtype = str(model.dtype).removeprefix("torch.")
    return (dtype, *(f"{name}={value}" for name, value in asked_for.items()), _text(resolved)), is_plain


def _resolved(hf_config: Any) -> Mapping[str, Any]:
    """A model's settings as vLLM has them, whatever they came from, without who wrote them."""
    told = _without_names(hf_config.to_dict() if hf_config is not None else {})
    return told if isinstance(told, Mapping) else {}


def _without_names(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _without_names(of)
            for key, of in value.items()
            if not str(key).startswith("_") and key not in _OF_NO_TENSOR
        }
    return [_without_names(each) for each in value] if isinstance(value, list | tuple) else value


def _long_ropes(value: Any, max_model_len: int, original: int | None = None) -> Iterator[str]:
    """Of every LongRoPE in the settings, whether vLLM takes its long factors: it does so for all positions
    once `max_model_len` is beyond what the model was first trained with."""
    if isinstance(value, Mapping):
        original = value.get("original_max_position_embeddings") or original
        if "longrope" in (value.get("rope_type"), value.get("type")):
            yield "unknown" if original is None else "long" if max_model_len > original else "short"
        for each in value.values():
            yield from _long_ropes(each, max_model_len, original)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str) if value else ""
