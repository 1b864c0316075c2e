"""vLLM's transfer configurations, as a user writes them."""

from __future__ import annotations

from typing import Any

from tests.vllm.stores import Store

MODEL_ID = "tiny"
PATIENCE_S = 15.0  # a look-up that is given up for want of a busy machine's time proves nothing


def ours(store: Store, *, role: str = "kv_both", policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    """`extra` is what the connector itself is told beside where the store is."""
    told: dict[str, Any] = {"store": store.address, "token_file": str(store.token_file)}
    told |= {"model_id": MODEL_ID, "lookup_timeout_s": PATIENCE_S}
    return {
        "kv_connector": "KVStrataConnector",
        "kv_connector_module_path": "kvstore.integrations.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": told | extra,
    }
