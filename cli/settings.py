"""Command-line flags over a configuration file: what `up` and others that start a service share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router.config import ServiceConfig

__all__ = ["service_config"]


def service_config(path: Path | None, flags: Mapping[str, Any]) -> ServiceConfig:
    """The file, the environment over it, the flags that were given over both. Raises ConfigError."""
    from kvstore.config import load_config

    return load_config(ServiceConfig, path, flags)
