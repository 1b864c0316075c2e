"""Which shards there are, where they listen, and how much of the keys each takes.

A topology is a value with a version that grows with every change: a client keeps the newest it saw.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import ConfigError
from kvstore.nouns import ShardId


@dataclass(frozen=True, slots=True)
class ShardEntry:
    shard: ShardId
    address: str  # host:port of its gRPC server
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Topology:
    version: int
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        ids = [entry.shard for entry in self.shards]
        if len(set(ids)) != len(ids):
            raise ConfigError(f"a shard is listed twice in the topology: {sorted(ids)}")
        if any(entry.weight <= 0 for entry in self.shards):
            raise ConfigError("a shard's weight must be above 0: leave the shard out to drain it")

    def weights(self) -> dict[ShardId, float]:
        return {entry.shard: entry.weight for entry in self.shards}
