"""Where the served model's files are, for the process that only needs its tokenizer.

A model in the cache is found without what loads models (torch: seconds and 200 MB); anything else goes the
long way.
"""

from __future__ import annotations

from pathlib import Path

from engine.model_cache import ModelCache, cache_root
from engine.progress import Progress, silent

__all__ = ["model_folder"]


def model_folder(name: str, progress: Progress = silent) -> Path:
    """The folder of a registry name, path or hub id; made or fetched if need be. Raises ModelError."""
    cache = ModelCache(cache_root())
    if not Path(name).exists() and "/" not in name and cache.is_complete(name):
        return cache.path(name)
    from engine.registry import resolve_model

    return resolve_model(name, progress=progress)
