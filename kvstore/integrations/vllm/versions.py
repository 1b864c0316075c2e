"""Which versions of vLLM the connector was tried with: its interface changes with every minor version."""

from __future__ import annotations

import re
from typing import Final

from kvstore.errors import ConfigError

__all__ = ["SUPPORTED", "check_version"]

SUPPORTED: Final = ((0, 32), (0, 33))


def check_version(version: str, *, any_version: bool) -> None:
    """Raises ConfigError for another version than SUPPORTED, unless `any_version`.

    >>> check_version("0.32.0+cpu", any_version=False)
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if any_version or (found is not None and (int(found[1]), int(found[2])) in SUPPORTED):
        return
    known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    raise ConfigError(
        f"this is vLLM {version}, and the connector was tried with {known}: install one of these, or set "
        "any_vllm_version to true in kv_connector_extra_config to run all the same"
    )
