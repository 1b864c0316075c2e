"""Placement: which shard owns a block. Weighted rendezvous hashing of the block's placement key.

Every client computes the same answer from the shard ids and weights alone. Adding a shard moves only what
the new one takes, removing one moves only what it held. The score of shard s with weight w for key k is
-w / ln(h(s, k)) with h uniform in (0, 1) (Schindelhauer & Schomaker 2005; Wang & Ravishankar 1998 for the
unweighted form): the highest wins, the next ranks are where replicas go. O(shards) a stripe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import xxhash

from kvstore.nouns import BlockKey, ShardId


def ranked(placement: BlockKey, weights: Mapping[ShardId, float]) -> list[ShardId]:
    """All shards, the owner first. Ties (they need equal 64-bit hashes) go to the lower id."""
    return sorted(weights, key=lambda shard: (-_score(placement, shard, weights[shard]), shard))


def owner(placement: BlockKey, weights: Mapping[ShardId, float]) -> ShardId:
    """The shard that owns every block of this stripe. Raises ValueError when there is no shard."""
    return min(weights, key=lambda shard: (-_score(placement, shard, weights[shard]), shard))


def _score(placement: BlockKey, shard: ShardId, weight: float) -> float:
    uniform = (xxhash.xxh3_64_intdigest(shard.encode() + b"\0" + placement) + 0.5) / 2.0**64
    return math.inf if uniform >= 1.0 else -weight / math.log(uniform)
