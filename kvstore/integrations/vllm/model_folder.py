"""Where the files of a model lie that vLLM was given by a folder or a name."""

from __future__ import annotations

import importlib
from pathlib import Path

from kvstore.errors import ConfigError

__all__ = ["folder_of"]


def folder_of(model: str, revision: str | None) -> Path:
    """Where a model's files lie: a folder, or what was fetched of a hub's repository before."""
    path = Path(model)
    if path.is_dir():
        return path
    try:
        hub = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(model, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"{model} is no folder and not in the hub's cache ({error}): give weights_digest and "
            "tokenizer_digest in kv_connector_extra_config, or the model's folder"
        ) from None
