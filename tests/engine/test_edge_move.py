"""Promise: a block moved between two pools is the same bytes, or it does not arrive, with a reason."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.edge import EdgeShard
from engine.edge_move import Pulled, pull
from engine.pool import KVPool
from kvstore import failpoints
from kvstore.core.versions import State
from kvstore.errors import ConfigError
from kvstore.frame import decode_frame, verify_identity
from kvstore.nouns import BlockKey, Epoch, Quality, ShardId, Snapshot, Tier, WeightsDigest
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.base import Place
from kvstore.transport.grpc.client import GrpcTransport
from tests.engine.edge_source import (
    BLOCKS,
    EPOCH,
    LAYOUT,
    NAMESPACE,
    TOKEN,
    chain_of,
    edge_of,
    fill,
    payload_of,
)

WAIT_S = 20.0


def payload_at(edge: EdgeShard, pool: KVPool, key: BlockKey) -> bytes:
    """What lies in the pool under a key, by the core's own word."""
    (version,) = (v for v in edge.driver.core.index.rows() if v.key == key and v.state is State.LIVE)
    assert version.tier is Tier.DEVICE
    slot = edge.tier._blocks[version.ref.slot][1]
    return pool.read_block(slot).tobytes()


def check(edge: EdgeShard) -> None:
    edge.check_integrity()
    lent = edge.lent_slots()
    edge.slots.check_integrity({slot: lent.count(slot) for slot in lent}, edge.tier.kept_slots())


async def moved(to: EdgeShard, source: Any, keys: Sequence[BlockKey]) -> Pulled:
    return await pull(to, source, NAMESPACE, "default", keys, timeout_s=WAIT_S)


async def test_moved_blocks_are_the_same_bytes_and_the_source_keeps_them() -> None:
    source, from_pool = edge_of("a", 40)
    target, to_pool = edge_of("b", 40)
    chain = fill(source, from_pool, BLOCKS)
    assert await moved(target, source.driver, chain.keys) == Pulled(held=0, blocks=BLOCKS)
    for key in chain.keys:
        assert payload_at(target, to_pool, key) == payload_at(source, from_pool, key)
    assert await moved(target, source.driver, chain.keys) == Pulled(held=BLOCKS)
    for edge in (source, target):
        assert edge.driver.core.leases == 0
        check(edge)


async def test_a_lossy_pool_takes_no_block_that_would_keep_a_better_name() -> None:
    source, from_pool = edge_of("a", 40)
    target, _ = edge_of("b", 40)
    target.kv_quality = Quality.INT8
    chain = fill(source, from_pool, BLOCKS)
    with pytest.raises(ConfigError, match="holds KV as INT8"):
        await moved(target, source.driver, chain.keys)
    assert not list(target.driver.core.index.rows())


async def test_what_the_source_lacks_is_a_miss_with_its_reason() -> None:
    source, from_pool = edge_of("a", 40)
    target, _ = edge_of("b", 40)
    chain = chain_of(BLOCKS)
    assert (await moved(target, source.driver, chain.keys)).misses == {"absent": BLOCKS}
    fill(source, from_pool, 7)
    pulled = await moved(target, source.driver, chain.keys)
    assert (pulled.blocks, pulled.misses) == (7, {"absent": BLOCKS - 7})


@pytest.mark.parametrize(
    ("epoch", "quality", "reason"),
    [
        (Epoch(1, WeightsDigest(b"other weights...")), Quality.LOSSLESS, "other_epoch"),
        (Epoch(0, EPOCH.weights_digest), Quality.LOSSLESS, "other_epoch"),
        (EPOCH, Quality.INT8, "low_quality"),
    ],
)
async def test_other_weights_and_lesser_quality_stay_where_they_are(
    epoch: Epoch, quality: Quality, reason: str
) -> None:
    source, from_pool = edge_of("a", 40, epoch=epoch)
    target, _ = edge_of("b", 40)
    chain = fill(source, from_pool, BLOCKS, quality)
    pulled = await moved(target, source.driver, chain.keys)
    assert (pulled.blocks, pulled.misses) == (0, {reason: BLOCKS})
    assert target.tier.kept_slots() == set()


async def test_a_source_that_lies_about_weights_is_not_believed() -> None:
    """It answers the match for whatever is asked; the frames say what they are."""
    source, from_pool = edge_of("a", 40, epoch=Epoch(EPOCH.number, WeightsDigest(b"other weights...")))
    target, _ = edge_of("b", 40)
    chain = fill(source, from_pool, 4)
    match = source.driver.match

    async def liar(snapshot: Snapshot, *args: Any, **kwargs: Any) -> Any:
        return await match(Snapshot(snapshot.namespace, source.epoch), *args, **kwargs)

    source.driver.match = liar  # type: ignore[method-assign]
    pulled = await moved(target, source.driver, chain.keys)
    assert (pulled.blocks, pulled.misses) == (0, {"other_weights": 4})
    assert target.counters["edge:rejected_other_weights"] == 1


async def test_what_was_on_its_way_when_the_weights_changed_is_of_the_old_ones() -> None:
    source, from_pool = edge_of("a", 40)
    target, to_pool = edge_of("b", 40)
    chain = fill(source, from_pool, BLOCKS)
    new, read = Epoch(EPOCH.number + 1, WeightsDigest(b"other weights...")), source.driver.read

    async def slowly(*args: Any, **kwargs: Any) -> Any:
        async for item in read(*args, **kwargs):
            if target.epoch != new:
                target.know(new)
                target.change_epoch(new)
            yield item

    source.driver.read = slowly  # type: ignore[method-assign]
    await moved(target, source.driver, chain.keys)
    assert target.epoch == new
    rows = [*target.driver.core.index.rows()]
    assert rows
    assert {row.epoch for row in rows} == {EPOCH}
    assert payload_at(target, to_pool, chain.keys[0]) == payload_at(source, from_pool, chain.keys[0])
    run = target.lend(NAMESPACE, "default", chain, BLOCKS, "later")
    assert run.blocks == (), "lent to nobody under the new ones"
    run.end()
    check(target)


async def test_a_block_that_breaks_on_the_way_does_not_enter() -> None:
    source, from_pool = edge_of("a", 40)
    target, _ = edge_of("b", 40)
    chain = fill(source, from_pool, BLOCKS)
    with failpoints.armed("storage.read", failpoints.Effect.CORRUPT, after=5, times=1):
        pulled = await moved(target, source.driver, chain.keys)
    assert pulled.blocks == 5
    assert pulled.misses == {"checksum": BLOCKS - 5}
    check(target)


async def test_idle_blocks_go_for_it_and_running_sequences_do_not() -> None:
    source, from_pool = edge_of("a", 40)
    target, to_pool = edge_of("b", 16)
    chain = fill(source, from_pool, BLOCKS)
    fill(target, to_pool, 10, tokens_seed=9)  # idle
    own = target.slots.allocate(6, "running")
    pulled = await moved(target, source.driver, chain.keys)
    assert (pulled.blocks, pulled.misses) == (10, {"no_space": BLOCKS - 10})
    target.slots.give_back(own)
    check(target)


async def test_nothing_arrives_while_a_request_is_being_admitted_and_nobody_writes_unasked() -> None:
    """What is free when an admission looks is free when it takes it."""
    source, from_pool = edge_of("a", 40)
    target, _ = edge_of("b", 40)
    chain = fill(source, from_pool, BLOCKS)
    with target.admission():
        pulled = await moved(target, source.driver, chain.keys)
        assert (pulled.blocks, pulled.misses) == (0, {"no_space": BLOCKS})
        assert target.slots.n_free == 40
    found = await source.driver.match(Snapshot(NAMESPACE, EPOCH), chain.keys[:1], "r", 5.0, timeout_s=1)
    frame = await source.tier.read(Place(found.slots[0], found.generations[0]))
    assert frame is not None
    with pytest.raises(OSError, match="set aside"):
        await target.tier.write(Place(0, 9), frame)
    assert (await moved(target, source.driver, chain.keys)).blocks == BLOCKS
    check(target)


async def test_a_move_that_breaks_off_leaves_nothing_set_aside() -> None:
    source, from_pool = edge_of("a", 40)
    target, _ = edge_of("b", 40)
    chain = fill(source, from_pool, BLOCKS)
    fail = failpoints.Fail(OSError("the copy failed"))
    with failpoints.armed("storage.write", fail, after=3, times=1):
        pulled = await moved(target, source.driver, chain.keys)
    assert pulled.blocks == 0
    assert target.slots.n_free == 40
    check(target)


async def test_a_move_under_concurrent_eviction_moves_true_bytes_or_nothing() -> None:
    """The source gives up and refills its slots while it is read; readers of it stay byte-exact meanwhile."""
    source, from_pool = edge_of("a", 30)
    target, to_pool = edge_of("b", 60)
    truth = {key: payload for seed in range(3) for key, payload in contents(seed)}
    fill(source, from_pool, BLOCKS)
    draw, going = random.Random(4), True

    async def churn() -> None:
        while going:
            source.make_room(draw.randrange(30), None)
            fill(source, from_pool, draw.randrange(1, BLOCKS), tokens_seed=draw.randrange(3))
            await asyncio.sleep(0)

    async def read() -> None:
        """A reader at the source, beside the move."""
        snapshot = Snapshot(NAMESPACE, EPOCH)
        while going:
            keys = chain_of(BLOCKS, draw.randrange(3)).keys
            found = await source.driver.match(snapshot, keys, "reader", 5.0, timeout_s=WAIT_S)
            places = zip(found.slots, found.generations, strict=True)
            refs = [source._ref(Place(*place)) for place in places]
            async for item in source.driver.read(NAMESPACE, refs, timeout_s=WAIT_S):
                assert item.frame is not None, "what is pinned stays"
                frame, payload = decode_frame(item.frame)
                assert verify_identity(frame, snapshot, keys[item.index], LAYOUT.fingerprint) is None
                assert payload.tobytes() == truth[keys[item.index]]
            if found.lease is not None:
                await source.driver.release([found.lease], timeout_s=WAIT_S)
            await asyncio.sleep(0)

    beside = [asyncio.create_task(churn()), asyncio.create_task(read())]
    came = 0
    for i in range(60):
        keys = chain_of(BLOCKS, i % 3).keys
        came += (await moved(target, source.driver, keys)).blocks
        for version in target.driver.core.index.rows():
            assert payload_at(target, to_pool, version.key) == truth[version.key]
        if i % 7 == 0:
            await target.forget()
    going = False
    await asyncio.gather(*beside)
    assert came > BLOCKS
    for edge in (source, target):
        assert edge.driver.core.leases == 0
        check(edge)


def contents(seed: int) -> list[tuple[BlockKey, bytes]]:
    return [(key, payload_of(key).tobytes()) for key in chain_of(BLOCKS, seed).keys]


@asynccontextmanager
async def served(edge: EdgeShard) -> AsyncIterator[GrpcTransport]:
    server = ShardServer(edge.driver, ServerConfig(token=TOKEN))
    transport = GrpcTransport(edge.driver.shard, await server.start(), TOKEN)
    try:
        yield transport
    finally:
        await transport.close()
        await server.stop(0.0)


async def test_over_grpc_in_one_process() -> None:
    source, from_pool = edge_of("a", 40)
    target, to_pool = edge_of("b", 40)
    chain = fill(source, from_pool, BLOCKS)
    async with served(source) as transport:
        assert await moved(target, transport, chain.keys) == Pulled(blocks=BLOCKS)
        await asyncio.sleep(0)
    for key in chain.keys:
        assert payload_at(target, to_pool, key) == payload_at(source, from_pool, key)


async def test_out_of_another_process_which_then_dies() -> None:
    """Two pools in two processes; when the source is gone a move costs its deadline at most, and misses."""
    child = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [sys.executable, "-m", "tests.engine.edge_source"],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert child.stdout is not None
        address = (await asyncio.to_thread(child.stdout.readline)).strip()
        assert address, "the source did not come up"
        target, to_pool = edge_of("b", 40)
        transport = GrpcTransport(ShardId("edge-child"), address, TOKEN)
        chain = chain_of(BLOCKS)
        assert await moved(target, transport, chain.keys) == Pulled(blocks=BLOCKS)
        for key, payload in contents(0):
            assert payload_at(target, to_pool, key) == payload
        child.kill()
        child.wait()
        await target.forget()
        pulled = await pull(target, transport, NAMESPACE, "default", chain.keys, timeout_s=2.0)
        assert (pulled.blocks, sum(pulled.misses.values())) == (0, BLOCKS)
        await transport.close()
    finally:
        child.kill()
        child.communicate()
