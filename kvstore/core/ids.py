"""Ids of leases and transactions: who knows one may use it, so nobody must be able to guess one.

A keyed hash of a count: 63 bits, never the same twice in practice, never those of an earlier life of the
shard. Deterministic, as everything in the core. About 1 us each.
"""

from __future__ import annotations

from hashlib import blake2b

from kvstore.nouns import Incarnation

_BITS = (1 << 63) - 1


class Ids:
    def __init__(self, incarnation: Incarnation, secret: bytes) -> None:
        self._key = blake2b(secret + incarnation.to_bytes(8, "little"), digest_size=32).digest()
        self._count = 0

    def next(self) -> int:
        """Never 0, which stands for none."""
        self._count += 1
        digest = blake2b(self._count.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
        return int.from_bytes(digest, "little") & _BITS or self.next()
