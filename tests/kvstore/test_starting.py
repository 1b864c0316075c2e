"""A shard over disks, as its settings have it: what it kept is found again by the same client calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client import StoreClient
from kvstore.codecs import CODECS
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, EpochConflict
from kvstore.hashing import digest16
from kvstore.nouns import DROP, Epoch, KVLayout, NamespaceSpec, Quality, ShardId
from kvstore.server import ServerConfig, ShardServer
from kvstore.session import StoreSession
from kvstore.starting import new_driver
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import Purge

TOKEN = "a token of the tests"
SECRET = b"a secret that outlives the shard"
LAYOUT = KVLayout(2, 0, 2, 64, "float32")
SPEC = NamespaceSpec("model", LAYOUT, digest16("tokenizer"))
E1 = Epoch(1, digest16("weights 1"))
TOKENS = list(range(32 * 12))
KV = np.random.default_rng(5).standard_normal((2, 2, len(TOKENS), 2, 64), dtype="float32")


def settings(folder: Path, **nvme: Any) -> StoreConfig:
    """A host of 8 blocks above a disk of many."""
    below = {"directories": [folder], "disk_nbytes": 64 << 20, "segment_nbytes": 4 << 20}
    write = {"write": "write_through"}
    return StoreConfig.model_validate({"capacity_nbytes": 1 << 20, "nvme": below | write | nvme})


@asynccontextmanager
async def life(store: StoreConfig, **opened: Any) -> AsyncIterator[tuple[StoreSession, StoreClient, Any]]:
    """One life of a shard, with a client that has a session open."""
    driver = new_driver(store, ShardId("shard-0"), SECRET)
    server = ShardServer(driver, ServerConfig(token=TOKEN))
    try:
        await driver.start()
        topology = Topology(1, (ShardEntry(driver.shard, await server.start()),))
        async with await StoreClient.connect(topology, token=TOKEN) as client:
            yield await client.open(SPEC, E1, **opened), client, driver
        driver.check_integrity()
    finally:
        await server.stop(0)
        await driver.close()


async def all_moved(driver: Any) -> None:
    moves, moved = driver.core.moves, driver.mover._moved
    async with asyncio.timeout(10), moved:
        await moved.wait_for(lambda: not moves.any_wanted() and not len(moves))


async def test_what_was_kept_is_read_by_the_next_life_and_comes_up(tmp_path: Path) -> None:
    async with life(settings(tmp_path)) as (session, _, driver):
        await session.put(TOKENS, KV)
        await all_moved(driver)
        kept = driver.core.index.nvme.used_nbytes
        assert kept >= 8 * LAYOUT.block_nbytes
    async with life(settings(tmp_path)) as (session, _, driver):
        assert driver.core.index.nvme.used_nbytes == kept
        hit = await session.get(TOKENS)
        assert hit.n_tokens >= 32
        assert np.array_equal(hit.kv, KV[:, :, : hit.n_tokens])
        await all_moved(driver)
        assert driver.core.counters["moved_to:host"] > 0
        again = await session.get(TOKENS)
        assert np.array_equal(again.kv, KV[:, :, : again.n_tokens])


async def test_what_was_purged_or_dropped_stays_away(tmp_path: Path) -> None:
    async with life(settings(tmp_path)) as (session, client, driver):
        await session.put(TOKENS[:128], KV[:, :, :128])
        await all_moved(driver)
        await driver.purge(Purge(session.namespace), timeout_s=10)
    async with life(settings(tmp_path)) as (session, client, driver):
        assert (await session.get(TOKENS[:128])).n_tokens == 0
        await session.put(TOKENS[:128], KV[:, :, :128])
        await all_moved(driver)
        two = Epoch(2, digest16("weights 2"))
        await client.register_epoch("model", two)
        await driver.advance_epoch("model", 2, DROP, timeout_s=10)
    async with life(settings(tmp_path)) as (session, client, _):
        assert (await session.get(TOKENS[:128])).n_tokens == 0
        with pytest.raises(EpochConflict):
            await client.register_epoch("model", Epoch(2, digest16("other weights")))


async def test_a_lossy_tier_serves_only_who_takes_it(tmp_path: Path) -> None:
    store = settings(tmp_path, codec="int8")
    assert store.min_quality is Quality.INT8
    async with life(store) as (session, _, driver):
        await session.put(TOKENS, KV)
        await all_moved(driver)
    async with life(store) as (session, _, _):
        assert (await session.get(TOKENS)).n_tokens == 0
    async with life(store, min_quality=CODECS["int8"].quality) as (session, _, _):
        hit = await session.get(TOKENS)
        assert hit.n_tokens >= 32
        exact = KV[:, :, : hit.n_tokens]
        assert not np.array_equal(hit.kv, exact)
        assert np.abs(hit.kv - exact).max() <= np.abs(exact).max() / 127


def test_sizes_that_do_not_go_together_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk_nbytes"):
        settings(tmp_path, disk_nbytes=4 << 20)
    with pytest.raises(ConfigError, match="unknown"):
        settings(tmp_path, codec="zip")


async def test_what_another_shard_kept_is_refused_by_name(tmp_path: Path) -> None:
    async with life(settings(tmp_path)) as (session, _, driver):
        await session.put(TOKENS[:64], KV[:, :, :64])
        await all_moved(driver)
    (tmp_path / "shard-0").rename(tmp_path / "shard-1")
    other = new_driver(settings(tmp_path), ShardId("shard-1"), SECRET)
    with pytest.raises(ConfigError, match="holds the blocks of shard-0, this is shard-1"):
        await other.start()
    await other.close()
    (tmp_path / "shard-1").rename(tmp_path / "shard-0")
    async with life(settings(tmp_path)) as (session, _, _):
        assert (await session.get(TOKENS[:64])).n_tokens == 64


def test_folders_of_shards_that_a_run_leaves_out_are_named(tmp_path: Path) -> None:
    disks = [tmp_path / "a", tmp_path / "b", tmp_path / "not made yet"]
    for disk in disks[:2]:
        for shard in ("shard-0", "shard-1", "shard-2", "other"):
            (disk / shard).mkdir(parents=True)
    section = settings(tmp_path, directories=disks, disk_nbytes=192 << 20).nvme
    assert section is not None
    assert section.left_out({"shard-0", "shard-1"}) == [disks[0] / "shard-2", disks[1] / "shard-2"]
    assert section.left_out({"shard-0", "shard-1", "shard-2"}) == []
