"""What a prefill instance of vLLM tells a decode instance, by way of their proxy's `kv_transfer_params`.

No addresses and no block ids: both ask the store. The decode instance learns how many tokens of the prompt
are there or on their way, so that it waits for them, and of which weights they are, so that it does not wait
for KV that it may not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvstore.nouns import Epoch

__all__ = ["announced", "answered"]

TOKENS: Final = "kvstrata_tokens"
EPOCH: Final = "kvstrata_epoch"


def answered(tokens: int, epoch: Epoch) -> dict[str, Any]:
    """For the request's answer: what the proxy gives the decode instance with the same prompt."""
    return {"do_remote_prefill": True, "do_remote_decode": False, TOKENS: tokens, EPOCH: _named(epoch)}


def announced(params: Mapping[str, Any] | None, epoch: Epoch | None) -> int:
    """How many tokens a prefill instance says are coming; 0 where none does, or they are of other weights.

    `epoch` is our own, None while it is not known. Raises nothing: a proxy may send anything.
    """
    if not params or not params.get("do_remote_prefill"):
        return 0
    tokens = params.get(TOKENS)
    if not isinstance(tokens, int) or (epoch is not None and params.get(EPOCH) != _named(epoch)):
        return 0
    return max(0, tokens)


def _named(epoch: Epoch) -> str:
    return f"{epoch.number}:{epoch.weights_digest.hex()}"
