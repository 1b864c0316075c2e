"""The keys of a request's blocks: our own chain over its tokens, with vLLM's cache_salt in the first block.

About 2 us a block. Both halves of the connector make the same keys of the same tokens, and so does our own
engine where there is no salt: that is how engines share.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.hashing import block_key
from kvstore.nouns import ROOT_KEY, BlockKey, NamespaceId

__all__ = ["Tokens", "chain_keys", "salt_digest", "tokens_of"]

Tokens = npt.NDArray[np.uint32]

_SALT_TAG: Final = b"kvstrata.vllm.cache_salt.1\0"
_NO_EXTRA: Final = bytes(32)


def tokens_of(token_ids: bytes) -> Tokens:
    """The tokens that a `Save` carries: u32, little-endian."""
    return np.frombuffer(token_ids, dtype="<u4")


def salt_digest(salt: str) -> bytes:
    """The first block's extra digest: zeros without a salt, as text has everywhere."""
    return hashlib.sha256(_SALT_TAG + salt.encode(errors="surrogatepass")).digest() if salt else _NO_EXTRA


def chain_keys(
    namespace: NamespaceId, tokens: Tokens, block_tokens: int, salt: str = "", parent: BlockKey = ROOT_KEY
) -> list[BlockKey]:
    """Of the full blocks of `tokens`, which follow the block `parent` (ROOT_KEY: begin the sequence)."""
    keys: list[BlockKey] = []
    extra = salt_digest(salt) if parent == ROOT_KEY else _NO_EXTRA
    for start in range(0, len(tokens) // block_tokens * block_tokens, block_tokens):
        parent = block_key(parent, namespace, tokens[start : start + block_tokens], extra)  # type: ignore[arg-type]
        keys.append(parent)
        extra = _NO_EXTRA
    return keys
