"""A worker of the connector over a fake backend, and stores for it in this process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.integrations.vllm.config import ConnectorConfig, read_config
from kvstore.integrations.vllm.keys import chain_keys
from kvstore.integrations.vllm.plans import Load, Save, StepPlan, StepReport
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.integrations.vllm.working import Worker
from kvstore.nouns import (
    BlockKey,
    Epoch,
    KVLayout,
    MissReason,
    NamespaceSpec,
    PinnedBlock,
    ShardId,
    WeightsDigest,
)
from kvstore.tiers.host import HostTier
from kvstore.topology import ShardEntry, Topology
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.integrations.vllm.backends import Backend, layer_of

Value = TypeVar("Value")

LAYERS, HEADS, DIM, BLOCKS = 3, 2, 8, 24
EPOCH = Epoch(1, WeightsDigest(bytes(16)))
BOUND_S = 20.0


def layout_of(ours: int = 32, dtype: str = "float32", heads: tuple[int, int] = (0, HEADS)) -> KVLayout:
    return KVLayout(LAYERS, *heads, DIM, dtype, ours)


class Store:
    """A shard in this process, and ways to it as a worker takes them."""

    def __init__(self, capacity_nbytes: int = 64 << 20) -> None:
        config = DriverConfig(ShardId("one"), capacity_nbytes, b"s" * 32, faults=True)
        self.driver = ShardDriver(config, HostTier())

    async def connect(self) -> StoreClient:
        return StoreClient.over([self.driver])

    def side(self, config: ConnectorConfig) -> StoreSide:
        return StoreSide(config, self.connect)


class Remote(Store):
    """The same behind a port, its frames in an arena."""

    def __init__(self, shared_memory: bool) -> None:
        self.shared_memory = shared_memory
        self.served: Served | None = None

    async def connect(self) -> StoreClient:
        if self.served is None:
            self.served = await Served.start("one", frames=100_000)
            self.driver = self.served.driver
        entry = ShardEntry(self.served.driver.shard, self.served.address)
        return await StoreClient.connect(Topology(1, (entry,)), token=TOKEN, shared_memory=self.shared_memory)

    async def restart(self) -> None:
        """A new process's worth of forgetting on the same port; `stop` it before."""
        assert self.served is not None
        port = int(self.served.address.rpartition(":")[2])
        self.served = await Served.start("one", frames=100_000, port=port)
        self.driver = self.served.driver


class Rig:
    """One worker: its pool, and what a scheduler's half would tell it."""

    def __init__(
        self, backend: Backend, store: Store, theirs: int, layout: KVLayout | None = None, rank: int = 0,
        **settings: Any,
    ) -> None:  # fmt: skip
        """Of two ranks where `rank` is 1, each with as many heads."""
        self.frames = layout or layout_of(heads=(rank * HEADS, (rank + 1) * HEADS))
        self.theirs = theirs
        specs = tuple(
            NamespaceSpec(
                "m", replace(self.frames, head_begin=r * HEADS, head_end=(r + 1) * HEADS), bytes(16)
            )
            for r in range(rank + 1)
        )
        self.config = read_config({"load_timeout_s": 10.0, "staging_nbytes": 8 << 20} | settings)
        self.setup = Setup(self.config, specs, rank, theirs, loads=True, saves=True)
        self.side = store.side(self.config)
        self.worker = Worker(self.setup, self.side)
        dtype = getattr(torch, self.frames.dtype)
        self.layer = layer_of(backend, theirs, HEADS, DIM)
        self.names = [f"model.layers.{i}.attn" for i in range(LAYERS)]
        self.pool = {name: backend.make(BLOCKS, theirs, HEADS, DIM, dtype) for name in self.names}
        self.worker.register(self.pool, dict.fromkeys(self.names, self.layer))

    # -- vLLM's doings -----------------------------------------------------------------------------

    def slots(self, block_ids: list[int], begin: int, end: int) -> torch.Tensor:
        return torch.tensor(
            [
                block_ids[token // self.theirs] * self.theirs + token % self.theirs
                for token in range(begin, end)
            ]
        )

    def compute(self, kv: torch.Tensor, block_ids: list[int], begin: int, end: int) -> None:
        """A forward pass. `kv`: [layer, k and v, token, head, dim], of all tokens."""
        for i, name in enumerate(self.names):
            self.layer.impl.do_kv_cache_update(
                self.layer, *kv[i, :, begin:end], self.pool[name], self.slots(block_ids, begin, end)
            )

    def holds(self, kv: torch.Tensor, block_ids: list[int], begin: int, end: int) -> bool:
        """Does the pool have just this of the tokens?"""
        expected = {name: pool.clone() for name, pool in self.pool.items()}
        actual, self.pool = self.pool, expected
        self.compute(kv, block_ids, begin, end)
        self.pool = actual
        return all(torch.equal(expected[name], actual[name]) for name in self.names)

    # -- the scheduler's half ----------------------------------------------------------------------

    def save(
        self, tokens: list[int], block_ids: list[int], begin: int, end: int, wanted: int | None = None,
        request: str = "r", **more: Any,
    ) -> None:  # fmt: skip
        wanted = begin if wanted is None else wanted
        taken = block_ids[wanted // self.theirs : -(-end // self.theirs)]
        token_ids = np.array(tokens[begin:end], dtype="<u4").tobytes()
        self.worker.save(
            StepPlan(saves=[Save(request, EPOCH, begin, wanted, end, token_ids, tuple(taken), **more)])
        )

    def settle(self) -> None:
        assert self.side.settle(BOUND_S)

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        return self.side.begin(work).result(BOUND_S)

    def match(self, tokens: list[int], salt: str = "") -> tuple[PinnedBlock, ...]:
        async def ask() -> tuple[PinnedBlock, ...]:
            session = await self.side.session(self.setup.specs[self.setup.rank], EPOCH)
            assert session is not None
            keys = chain_keys(
                session.namespace, np.array(tokens, dtype="<u4"), self.frames.block_tokens, salt
            )
            found = await session.match(keys, owner="t", lease_s=60.0, timeout_s=BOUND_S)
            await session.release(found.leases)
            return tuple(found.blocks)

        return self.run(ask())

    def until_reachable(self) -> None:
        """gRPC waits before it connects again: ask until the shard says that it has nothing."""

        async def ask() -> None:
            session = await self.side.session(self.setup.specs[self.setup.rank], EPOCH)
            assert session is not None
            miss: MissReason | None = MissReason.SHARD_UNAVAILABLE
            while miss is MissReason.SHARD_UNAVAILABLE:
                keys = [BlockKey(bytes(32))]
                miss = (await session.match(keys, owner="t", lease_s=1.0, timeout_s=BOUND_S)).miss

        self.run(asyncio.wait_for(ask(), BOUND_S))

    def load(
        self, run: tuple[PinnedBlock, ...], block_ids: list[int], begin: int, end: int, request: str = "r"
    ) -> None:
        first, last = begin // self.frames.block_tokens, -(-end // self.frames.block_tokens)
        runs = ((),) * self.setup.rank + (run[first:last],)
        load = Load(request, EPOCH, begin, end, runs, tuple(block_ids))
        self.worker.start(StepPlan(loads=[load]))

    def loaded(self, until: Callable[[StepReport], bool] = lambda report: bool(report.loaded)) -> StepReport:
        """The report that tells of the end."""
        self.settle()
        report = self.worker.report()
        assert until(report)
        return report

    def leaks(self) -> dict[str, int]:
        saver, loader = self.worker._saver, self.worker._loader
        assert saver is not None
        assert loader is not None
        found = {
            "staging": saver._staging.held,
            "chunks": loader.held_slots,
            "waiting": saver._waiting,
            "loads": sum(not under_way.is_over for under_way in loader._under_way),
            "tasks": len(self.side._tasks),
        }
        return {what: count for what, count in found.items() if count}


@contextmanager
def rig(
    backend: Backend, store: Store, theirs: int, layout: KVLayout | None = None, **settings: Any
) -> Iterator[Rig]:
    """Nothing leaks, whatever the test does."""
    made = Rig(backend, store, theirs, layout, **settings)
    try:
        yield made
    finally:
        made.worker.close()
    assert made.leaks() == {}
    store.driver.check_integrity()


def some_kv(tokens: int, dtype: str = "float32") -> torch.Tensor:
    return torch.randn(LAYERS, 2, tokens, HEADS, DIM).to(getattr(torch, dtype))


def some_tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(50_000) for _ in range(count)]


def seeded() -> random.Random:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
