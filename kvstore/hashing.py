"""Identities: block keys, namespace ids, placement keys. Canonical bytes in, sha256 out.

A collision here would be a wrong answer, so the hash is cryptographic and every field has a fixed
length or a length before it. About 1 us a block. Golden vectors: tests/kvstore/test_hashing.py. A change
of any byte here is a change of `KEY_FORMAT` and empties every cache: treat it so.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvstore.nouns import (
    NAMESPACE_ID_NBYTES,
    ROOT_KEY,
    WEIGHTS_DIGEST_NBYTES,
    BlockKey,
    NamespaceId,
    NamespaceSpec,
    WeightsDigest,
)

KEY_FORMAT: Final = 1
STRIPE_BLOCKS: Final = 16
"""Consecutive blocks of one prefix that share a placement key, hence a shard."""

_KEY_TAG: Final = b"kvstrata.block\0" + struct.pack("<H", KEY_FORMAT)
_NO_EXTRA: Final = bytes(32)


def block_key(
    parent: BlockKey, namespace: NamespaceId, tokens: Sequence[int], extra: bytes = _NO_EXTRA
) -> BlockKey:
    """The key of one full block: sha256(tag, format, parent, namespace, extra, tokens as LE u32).

    `extra` is a 32-byte digest of what tokens do not say (images and the like); zeros for text.
    """
    if len(extra) != len(_NO_EXTRA):
        raise ValueError(f"extra digest must be {len(_NO_EXTRA)} bytes, got {len(extra)}")
    body = np.asarray(tokens, dtype="<u4").tobytes()
    return BlockKey(hashlib.sha256(b"".join((_KEY_TAG, parent, namespace, extra, body))).digest())


class KeyChain:
    """The keys of one sequence's full blocks, extended as tokens arrive.

    >>> chain = KeyChain(NamespaceId(bytes(16)), block_tokens=2)
    >>> chain.extend([1, 2, 3]), len(chain.keys), len(chain.pending)
    (None, 1, 1)
    """

    __slots__ = ("block_tokens", "keys", "namespace", "pending")

    def __init__(self, namespace: NamespaceId, block_tokens: int) -> None:
        self.namespace = namespace
        self.block_tokens = block_tokens
        self.keys: list[BlockKey] = []
        self.pending: list[int] = []  # tokens of the block that is not full yet

    def extend(self, tokens: Sequence[int]) -> None:
        self.pending.extend(tokens)
        size = self.block_tokens
        full = len(self.pending) // size * size
        for start in range(0, full, size):
            parent = self.keys[-1] if self.keys else ROOT_KEY
            self.keys.append(block_key(parent, self.namespace, self.pending[start : start + size]))
        del self.pending[:full]

    def parent(self, index: int) -> BlockKey:
        return self.keys[index - 1] if index else ROOT_KEY

    def placement(self, index: int) -> BlockKey:
        """Key of the first block of block `index`'s stripe."""
        return self.keys[index - index % STRIPE_BLOCKS]


def placement_keys(keys: Sequence[BlockKey]) -> list[BlockKey]:
    """The placement key of each block of a chain given from its first block on."""
    return [keys[i - i % STRIPE_BLOCKS] for i in range(len(keys))]


def tenant_salt(cluster_secret: bytes, tenant: str) -> bytes:
    """32 bytes that never leave the server: two tenants never share a namespace id."""
    return hmac.digest(cluster_secret, b"kvstrata.tenant.1\0" + tenant.encode(), "sha256")


def namespace_id(salt: bytes, spec: NamespaceSpec) -> NamespaceId:
    """Server side only. Length-prefixed fields under HMAC-SHA256 keyed by the tenant's salt."""
    fields = (spec.model_id.encode(), spec.adapter_digest, spec.tokenizer_digest, spec.layout.canonical())
    message = b"kvstrata.namespace.1\0" + b"".join(struct.pack("<I", len(f)) + f for f in fields)
    return NamespaceId(hmac.digest(salt, message, "sha256")[:NAMESPACE_ID_NBYTES])


def digest16(*parts: str | bytes) -> WeightsDigest:
    """16 bytes that stand for what `parts` name: weights, a tokenizer, an adapter.

    Name what decides the bytes (a file's sha256, a commit), not what it is called: equal digests are taken
    for equal KV.
    """
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    message = b"kvstrata.name.1\0" + b"".join(struct.pack("<I", len(part)) + part for part in encoded)
    return WeightsDigest(hashlib.sha256(message).digest()[:WEIGHTS_DIGEST_NBYTES])
