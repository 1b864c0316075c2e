"""Edge shards without an engine: pools whose blocks anybody can recompute. Run, it serves one."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import numpy.typing as npt

import kvstore.polling  # noqa: F401 - before anything that imports grpc
from engine.edge import EdgeShard
from engine.pool import KVPool
from kvstore.clock import Clock, MonotonicClock
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import (
    BlockKey,
    Epoch,
    KVLayout,
    NamespaceId,
    NamespaceSpec,
    Quality,
    WeightsDigest,
)
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.pool_slots import PoolSlots

LAYOUT = KVLayout(layers=4, head_begin=0, head_end=2, head_dim=16, dtype="float32", block_tokens=8)
SPEC = NamespaceSpec("tiny", LAYOUT, bytes(16))
EPOCH = Epoch(1, WeightsDigest(b"the very weights"))
NAMESPACE = NamespaceId(b"a namespace's id")
TOKEN = "a token"
BLOCKS = 20


def edge_of(
    name: str, n_slots: int, epoch: Epoch = EPOCH, clock: Clock | None = None
) -> tuple[EdgeShard, KVPool]:
    pool = KVPool(LAYOUT, n_slots)
    edge = EdgeShard(name, SPEC, epoch, pool, PoolSlots(n_slots), clock or MonotonicClock())
    edge.open(NAMESPACE, "default")
    return edge, pool


def chain_of(blocks: int, seed: int = 0) -> KeyChain:
    chain = KeyChain(NAMESPACE, LAYOUT.block_tokens)
    chain.extend([seed] * (blocks * LAYOUT.block_tokens))
    return chain


def payload_of(key: BlockKey) -> npt.NDArray[np.uint8]:
    return np.frombuffer(np.random.default_rng([*key]).bytes(LAYOUT.block_nbytes), np.uint8)


def fill(
    edge: EdgeShard, pool: KVPool, blocks: int, quality: Quality = Quality.LOSSLESS, tokens_seed: int = 0
) -> KeyChain:
    """As a sequence does that computes all its blocks and ends: as many as there is room for."""
    chain = chain_of(blocks, tokens_seed)
    run = edge.lend(NAMESPACE, "default", chain, 0, "filler")
    edge.make_room(blocks, run)
    slots = edge.slots.allocate(min(blocks, edge.slots.n_free), "filler")
    for key, slot in zip(chain.keys, slots, strict=False):
        pool.write_block(slot, payload_of(key))
    run.will_keep(Lineage(edge.epoch, quality), ())
    run.admitted(tuple(slots))
    for index in range(len(slots)):
        run.filled(index, slots[index])
    edge.slots.give_back(slots)
    run.end()
    return chain


async def _serve() -> None:
    edge, pool = edge_of("child", 40)
    fill(edge, pool, BLOCKS)
    server = ShardServer(edge.driver, ServerConfig(token=TOKEN))
    print(await server.start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0.0)


if __name__ == "__main__":
    asyncio.run(_serve())
