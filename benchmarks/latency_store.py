"""The store that benchmarks/latency.py asks: one chain of blocks, matched again and again."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from kvstore.answers import PublishBlock
from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.hashing import KeyChain
from kvstore.nouns import (
    BlockKey,
    Epoch,
    KVLayout,
    LeaseId,
    NamespaceSpec,
    Quality,
    ShardId,
    WeightsDigest,
)
from kvstore.session import StoreSession
from kvstore.tiers.host import HostTier
from kvstore.transport.base import ShardTransport

LAYOUT = KVLayout(2, 0, 1, 4, "float32", 2)  # bytes do not matter here
SPEC = NamespaceSpec("bench", LAYOUT, bytes(16))
EPOCH = Epoch(1, WeightsDigest(bytes(16)))
LEASE_S, TIMEOUT_S = 60.0, 30.0


@dataclass(slots=True)
class Store:
    session: StoreSession
    transport: ShardTransport
    keys: list[BlockKey]
    leases: list[tuple[ShardId, LeaseId]] = field(default_factory=list)

    async def renew(self) -> None:
        await self.transport.renew([], LEASE_S, timeout_s=TIMEOUT_S)

    async def match(self) -> None:
        found = await self.session.match(self.keys, owner="bench", lease_s=LEASE_S, timeout_s=TIMEOUT_S)
        assert len(found.blocks) == len(self.keys)
        self.leases += found.leases

    async def match_on_transport(self) -> None:
        found = await self.transport.match(
            self.session._snapshot, self.keys, "bench", LEASE_S, timeout_s=TIMEOUT_S
        )
        assert found.lease is not None
        self.leases.append((self.transport.shard, found.lease))

    async def release_all(self) -> None:
        await self.session.release(self.leases)
        self.leases.clear()

    async def keys_per_s(self, concurrent: int, matches: int) -> float:
        """Of matches that are released, so many under way at once."""

        async def match_and_release() -> None:
            for _ in range(matches // concurrent):
                found = await self.session.match(
                    self.keys, owner="bench", lease_s=LEASE_S, timeout_s=TIMEOUT_S
                )
                assert len(found.blocks) == len(self.keys)
                await self.session.release(found.leases)

        started = time.perf_counter()
        await asyncio.gather(*(match_and_release() for _ in range(concurrent)))
        done = matches // concurrent * concurrent
        return done * len(self.keys) / (time.perf_counter() - started)


async def filled(client: StoreClient, blocks: int) -> Store:
    session = await client.open(SPEC, EPOCH)
    made = KeyChain(session.namespace, LAYOUT.block_tokens)
    made.extend(range(blocks * LAYOUT.block_tokens))
    payload: Any = memoryview(bytes(LAYOUT.block_nbytes))
    await session.publish(
        [PublishBlock(key, made.parent(i), i, made.placement(i), payload) for i, key in enumerate(made.keys)],
        quality=Quality.LOSSLESS,
        owner="bench",
        pin_for_s=None,
        timeout_s=TIMEOUT_S,
    )
    (transport,) = client._peers.transports.values()
    return Store(session, transport, made.keys)


async def core_match_us(blocks: int, calls: int) -> float:
    """Median of a match in the core, without a wire or a client."""
    config = DriverConfig(ShardId("bench"), 1 << 30, b"a secret of the benchmark")
    driver = ShardDriver(config, HostTier())
    store = await filled(StoreClient.over([driver]), blocks)
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        found = driver.core.match(store.session._snapshot, store.keys, "bench", LEASE_S, time.monotonic())
        taken.append((time.perf_counter() - started) * 1e6)
        assert found.lease is not None
        driver.core.release([found.lease])
    return statistics.median(taken)
