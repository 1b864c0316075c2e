"""Placement: every client agrees, few blocks move, weights count."""

from __future__ import annotations

import hashlib

import pytest

from kvstore.errors import ConfigError
from kvstore.nouns import BlockKey, ShardId
from kvstore.placement import owner, ranked
from kvstore.topology import ShardEntry, Topology

KEYS = [BlockKey(hashlib.sha256(bytes([i % 256, i // 256])).digest()) for i in range(4000)]
EVEN = {ShardId(f"shard-{i}"): 1.0 for i in range(4)}


def test_golden_owners() -> None:
    """Other clients compute the same owners: a change here strands every cached block."""
    assert [owner(key, EVEN) for key in KEYS[:6]] == [
        "shard-3", "shard-0", "shard-2", "shard-2", "shard-1", "shard-3",
    ]  # fmt: skip


def test_the_owner_is_the_first_rank_and_every_shard_has_one() -> None:
    for key in KEYS[:100]:
        order = ranked(key, EVEN)
        assert order[0] == owner(key, EVEN)
        assert sorted(order) == sorted(EVEN)


def test_keys_spread_by_weight() -> None:
    heavy = EVEN | {ShardId("shard-0"): 3.0}
    counts = {shard: sum(owner(key, heavy) == shard for key in KEYS) for shard in heavy}
    assert counts[ShardId("shard-0")] / len(KEYS) == pytest.approx(0.5, abs=0.04)
    assert counts[ShardId("shard-1")] / len(KEYS) == pytest.approx(1 / 6, abs=0.03)


def test_a_shard_that_leaves_moves_only_what_it_held() -> None:
    left = {shard: weight for shard, weight in EVEN.items() if shard != "shard-2"}
    for key in KEYS:
        before = owner(key, EVEN)
        if before != "shard-2":
            assert owner(key, left) == before


def test_a_topology_refuses_nonsense() -> None:
    entry = ShardEntry(ShardId("a"), "127.0.0.1:1")
    with pytest.raises(ConfigError, match="twice"):
        Topology(1, (entry, entry))
    with pytest.raises(ConfigError, match="above 0"):
        Topology(1, (ShardEntry(ShardId("a"), "127.0.0.1:1", 0.0),))
