"""vLLM's transfer configurations, as a user writes them."""

from __future__ import annotations

from typing import Any

from tests.vllm.stores import Store

MODEL_ID = "tiny"


def ours(store: Store, *, role: str = "kv_both", policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    """`extra` is what the connector itself is told beside where the store is."""
    told = {"store": store.address, "token_file": str(store.token_file), "model_id": MODEL_ID}
    return {
        "kv_connector": "KVStrataConnector",
        "kv_connector_module_path": "kvstore.integrations.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": told | extra,
    }
