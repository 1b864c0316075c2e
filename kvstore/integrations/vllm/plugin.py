"""vLLM's plugin entry point: `{"kv_connector": "KVStrataConnector"}` does without a module path."""

from __future__ import annotations

import contextlib

__all__ = ["register"]

NAME = "KVStrataConnector"


def register() -> None:
    """Called by vLLM in each of its processes, and in some more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    with contextlib.suppress(ValueError):  # it is registered
        KVConnectorFactory.register_connector(NAME, "kvstore.integrations.vllm.connector", NAME)
