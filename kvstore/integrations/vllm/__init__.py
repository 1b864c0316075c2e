"""vLLM's connector, loaded by its path: {"kv_connector": "KVStrataConnector",
"kv_connector_module_path": "kvstore.integrations.vllm"}. Nothing here needs vLLM until the class is named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.integrations.vllm.connector import KVStrataConnector

__all__ = ["KVStrataConnector"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("kvstore.integrations.vllm.connector"), name)
