"""A shard as its settings have it: core, host arena, and the tier below if there is one."""

from __future__ import annotations

from kvstore.config import StoreConfig
from kvstore.driver import ShardDriver
from kvstore.nouns import ShardId
from kvstore.tiers.arena import ArenaTier
from kvstore.tiers.nvme.tier import NvmeTier


def new_driver(store: StoreConfig, shard: ShardId, cluster_secret: bytes) -> ShardDriver:
    """Not started yet: `start` reads what survived. Raises ConfigError."""
    arena = ArenaTier(store.capacity_nbytes)
    if store.nvme is None:
        return ShardDriver(store.driver(shard, cluster_secret), arena)
    nvme = NvmeTier(store.nvme.files(shard))
    return ShardDriver(store.driver(shard, cluster_secret, nvme.room_nbytes()), arena, durable=nvme)
