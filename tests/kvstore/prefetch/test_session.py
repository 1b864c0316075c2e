"""Prefetch as a client does it, over gRPC and in process: one answer of all shards, and never an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.nouns import KVLayout, NamespaceSpec, ShardId
from kvstore.prefetching import PrefetchMode, PrefetchResult, joined, wait_of
from kvstore.server import ServerConfig, ShardServer
from kvstore.session import StoreSession
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import Announced
from tests.kvstore.oracle import epoch
from tests.kvstore.prefetch.below import MemoryTier, sink, tiered

TOKEN = "a token"
SPEC = NamespaceSpec("m", KVLayout(2, 0, 1, 4, "float32", block_tokens=2), bytes(16))
TOKENS = 400  # 200 blocks: several stripes, so both shards have some
IDS = list(range(TOKENS))
KV = np.arange(2 * 2 * TOKENS * 4, dtype=np.float32).reshape(2, 2, TOKENS, 1, 4)


class Store:
    """Two shards over gRPC, a client of them, and one prompt that lies below."""

    def __init__(self) -> None:
        made = [tiered(f"shard-{i}", frames=1024) for i in range(2)]
        self.drivers: list[ShardDriver] = [driver for driver, _ in made]
        self.below: list[MemoryTier] = [below for _, below in made]
        self.servers: list[ShardServer] = []

    async def open(self) -> Store:
        entries = []
        for driver in self.drivers:
            server = ShardServer(driver, ServerConfig(token=TOKEN))
            self.servers.append(server)
            entries.append(ShardEntry(driver.shard, await server.start()))
        self.client = await StoreClient.connect(Topology(1, tuple(entries)), token=TOKEN)
        self.session: StoreSession = await self.client.open(SPEC, epoch(1))
        assert (await self.session.put(IDS, KV)).n_tokens == TOKENS
        for driver in self.drivers:
            await sink(driver)
            await driver.start()
        return self

    async def close(self) -> None:
        for below in self.below:
            below.gate.set()
        await self.client.close()
        for server in self.servers:
            await server.stop(0)
        for driver in self.drivers:
            await driver.close()
            driver.check_integrity()


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    made = await Store().open()
    yield made
    await made.close()


async def test_all_of_a_prompt_comes_up_and_reads_as_it_was_put(store: Store) -> None:
    told = await store.session.prefetch([*IDS, 7], mode="wait_complete")
    assert (told.n_tokens, told.blocks, told.on_host, told.coming) == (TOKENS, TOKENS // 2, TOKENS // 2, 0)
    assert told.is_ready
    hit = await store.session.get(IDS)
    assert np.array_equal(hit.kv, KV)
    assert all(driver.core.counters["prefetch:announced_in_time"] for driver in store.drivers)


async def test_best_effort_does_not_wait(store: Store) -> None:
    for below in store.below:
        below.gate.clear()
    told = await store.session.prefetch(IDS)
    assert (told.n_tokens, told.on_host, told.coming) == (TOKENS, 0, TOKENS // 2)
    assert told.coming_nbytes == sum(d.core.index.nvme.used_nbytes for d in store.drivers)
    told = await store.session.prefetch(IDS, mode="timeout", wait_s=0.05)
    assert (told.on_host, told.coming) == (0, TOKENS // 2)


async def test_waiting_for_all_ends_within_the_calls_own_time(store: Store) -> None:
    for below in store.below:
        below.gate.clear()
    async with asyncio.timeout(5):
        told = await store.session.prefetch(IDS, mode="wait_complete", timeout_s=0.4)
    assert (told.n_tokens, told.coming, told.unanswered) == (TOKENS, TOKENS // 2, ())


async def test_waiting_calls_do_not_hold_up_others(store: Store) -> None:
    for below in store.below:
        below.gate.clear()
    waiting = asyncio.create_task(store.session.prefetch(IDS, mode="wait_complete", timeout_s=30.0))
    async with asyncio.timeout(5):
        found = await store.session.match(store.session.keys(IDS), owner="r", lease_s=5.0, timeout_s=5.0)
    assert len(found.blocks) == TOKENS // 2
    assert not waiting.done()
    for below in store.below:
        below.gate.set()
    assert (await waiting).is_ready
    await store.session.release(found.leases)


async def test_a_shard_that_is_gone_is_named_and_costs_its_blocks(store: Store) -> None:
    await store.servers[0].stop(0)
    told = await store.session.prefetch(IDS, timeout_s=1.0)
    assert told.unanswered == (store.drivers[0].shard,)
    assert told.blocks < TOKENS // 2
    assert store.client.counters["announce:failed"] == 1


async def test_a_shard_that_restarted_is_introduced_again(store: Store) -> None:
    port = int(store.client.topology.shards[0].address.rpartition(":")[2])
    await store.servers[0].stop(0)
    driver, _ = tiered(store.drivers[0].shard)
    store.servers[0] = ShardServer(driver, ServerConfig(port=port, token=TOKEN))
    await store.servers[0].start()
    told = await store.session.prefetch(IDS, timeout_s=20.0)
    assert told.unanswered == ()
    assert store.client.counters["reopened"] == 1


def test_a_gap_ends_the_run_whatever_lies_behind_it() -> None:
    one, two = ShardId("one"), ShardId("two")
    placed = {one: [0, 1, 4, 5], two: [2, 3]}
    answers = {one: Announced([2, 2, 2, 2], 0, 0, 9.0), two: Announced([3], 1, 100, 5.0)}
    told = joined(6, 32, placed, answers)
    assert told == PrefetchResult(96, 3, 2, 1, 100, 5.0)
    assert joined(6, 32, placed, answers | {two: None}) == PrefetchResult(64, 2, 2, 0, 0, 0.0, (two,))


@pytest.mark.parametrize(
    ("mode", "wait_s", "waits"),
    [("best_effort", 9.0, 0.0), ("timeout", 1.0, 1.0), ("timeout", 99.0, 9.5), ("wait_complete", 0.0, 9.5)],
)
def test_how_long_each_mode_waits(mode: PrefetchMode, wait_s: float, waits: float) -> None:
    assert wait_of(mode, wait_s, 10.0) == waits


def test_a_mode_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="best_effort, timeout or wait_complete"):
        wait_of("eager", 1.0, 10.0)  # type: ignore[arg-type]
    for wait_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="how many seconds"):
            wait_of("timeout", wait_s, 10.0)
