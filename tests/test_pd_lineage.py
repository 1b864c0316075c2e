"""Promise 3 through both roles: what attended to stale or lossy KV is never published as better than that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.worker_config import WorkerConfig
from kvstore.answers import PublishBlock
from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.hashing import KeyChain
from kvstore.nouns import Epoch, NamespaceSpec, PinnedBlock, Quality, WeightsDigest, allow_stale
from kvstore.session import StoreSession
from kvstore.topology import Topology
from tests.role_parts import BLOCK_TOKENS, CACHING, ENGINE, WAIT_S, pair_over, prompt, request, shard

OLD = Epoch(0, WeightsDigest(b"weights of old.."))


async def seed_store(
    driver: ShardDriver, folder: Path, tokens: tuple[int, ...], epoch: Epoch | None, quality: Quality
) -> None:
    """Put the prompt's blocks into the store as others computed them: at another epoch or quality."""
    engine = Engine.load(folder, ENGINE)
    session = await _session(driver, engine, epoch or Epoch(1, engine.weights_digest))
    chain = KeyChain(session.namespace, BLOCK_TOKENS)
    chain.extend(tokens)
    payload = memoryview(bytes(engine.layout.block_nbytes))
    blocks = [
        PublishBlock(key, chain.parent(i), i, chain.placement(i), payload) for i, key in enumerate(chain.keys)
    ]
    published = await session.publish(
        blocks, quality=quality, owner="others", pin_for_s=None, timeout_s=WAIT_S
    )
    assert all(isinstance(block, PinnedBlock) for block in published.blocks)


async def _session(driver: ShardDriver, engine: Engine, epoch: Epoch) -> StoreSession:
    spec = NamespaceSpec("tiny", engine.layout, engine.tokenizer.digest)
    return await StoreClient.over([driver]).open(spec, epoch)


def versions_beyond(driver: ShardDriver, seeded: int) -> list[tuple[int, Epoch, Quality]]:
    """(chain index, epoch, quality) of what is in the store behind the blocks that others put there."""
    found = [(v.chain_index, v.epoch, v.quality) for v in driver.core.index.rows()]
    return sorted(one for one in found if one[0] >= seeded)


async def test_over_lossy_blocks_both_roles_publish_at_the_lossy_floor(folder: Path) -> None:
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, None, Quality.INT8)
    async with pair_over(folder, [driver], min_quality=Quality.INT8) as pair:
        asked = request(tokens + prompt(20, 1), max_tokens=20)
        first = await pair.prefill.prefill(asked)
        assert first.stats.cached_tokens == 16
        handoff = await pair.prefill.handoff("r", 1)
        assert handoff is not None
        assert (handoff.floor, handoff.foreign) == (Quality.INT8, False)
        await pair.decode_all(handoff)
        await pair.assert_nothing_held()
    published = versions_beyond(driver, 2)
    assert [index for index, _, _ in published] == [2, 3, 4, 5], "of prefill and of decode"
    assert {quality for _, _, quality in published} == {Quality.INT8}


@pytest.mark.parametrize(("hot", "quality"), [("int8", Quality.INT8), ("fp8", Quality.FP8)])
async def test_what_lay_in_a_lossy_pool_is_published_as_lossy(
    folder: Path, hot: str, quality: Quality
) -> None:
    """Also over a lossless block: once in the pool it is codes, and so is what is computed over it."""
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, None, Quality.LOSSLESS)
    engine = CACHING.model_copy(update={"hot_pool": hot})
    async with pair_over(folder, [driver], engine=engine, min_quality=quality) as pair:
        asked = request(tokens + prompt(20, 1), max_tokens=20)
        first = await pair.prefill.prefill(asked)
        assert first.stats.cached_tokens == 16
        handoff = await pair.prefill.handoff("r", 1)
        assert handoff is not None
        assert handoff.floor is quality
        await pair.decode_all(replace(handoff, floor=Quality.LOSSLESS))  # of a prefill that lost nothing
        for worker in pair.workers:
            assert worker.edge is not None
            kept = {v.quality for v in worker.edge.driver.core.index.rows()}
            assert kept == {quality}, "in the pool itself, onboarded blocks included"
        await pair.assert_nothing_held()
    published = versions_beyond(driver, 2)
    assert [index for index, _, _ in published] == [2, 3, 4, 5], "of prefill and of decode"
    assert {found for _, _, found in published} == {quality}


def test_a_lossy_pool_where_nothing_lossy_may_be_used_is_refused() -> None:
    lossy = EngineConfig(hot_pool="int8")
    with pytest.raises(ValueError, match="hot_pool int8 makes KV of quality INT8"):
        WorkerConfig(worker_id="w", model="m", engine=lossy, topology=Topology(1, ()))


async def test_a_lossless_reader_does_not_see_them(folder: Path) -> None:
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, None, Quality.INT8)
    async with pair_over(folder, [driver]) as pair:
        first, _ = await pair.generate(request(tokens + prompt(20, 1)))
        assert first.stats.cached_tokens == 0
        assert first.stats.misses == {"low_quality": 4}
        assert {quality for _, _, quality in versions_beyond(driver, 2)} == {Quality.LOSSLESS}


async def test_over_stale_blocks_nothing_is_published_by_either_role(folder: Path) -> None:
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, OLD, Quality.LOSSLESS)
    await driver.advance_epoch("tiny", OLD.number, allow_stale(1), timeout_s=5.0)
    async with pair_over(folder, [driver], stale_lag_max=1) as pair:
        first = await pair.prefill.prefill(request(tokens + prompt(20, 1), max_tokens=20))
        assert first.stats.cached_tokens == 16
        assert first.stats.epochs == (0, 1)
        handoff = await pair.prefill.handoff("r", 1)
        assert handoff is not None
        assert handoff.foreign
        assert len(handoff.blocks) == 2, "only what is in the store can be handed over by reference"
        assert handoff.tail is None, "a tail stands right behind the blocks, or nowhere"
        await pair.decode_all(handoff)
        assert (await pair.decode.counters())["publish:withheld"] > 0
        await pair.assert_nothing_held()
    assert versions_beyond(driver, 2) == []


async def test_old_blocks_are_not_even_seen_without_leave(folder: Path) -> None:
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, OLD, Quality.LOSSLESS)
    async with pair_over(folder, [driver]) as pair:
        asked = request(tokens + prompt(20, 1))
        first, output = await pair.generate(asked)
        assert (first.stats.cached_tokens, first.stats.misses) == (0, {"other_epoch": 4})
    assert {epoch.number for _, epoch, _ in versions_beyond(driver, 2)} == {1}
    assert len(output) == 12


async def test_a_lineage_never_rises_again(folder: Path) -> None:
    """Decode recomputes all blocks itself, but is told of a floor by the handoff: the floor stays."""
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, None, Quality.INT8)
    async with pair_over(folder, [driver], min_quality=Quality.INT8) as pair:
        await pair.prefill.prefill(request(tokens + prompt(4, 1), max_tokens=20))
        handoff = await pair.prefill.handoff("r", 1)
        assert handoff is not None
        await pair.decode_all(replace(handoff, blocks=()))
        await pair.assert_nothing_held()
    published = versions_beyond(driver, 2)
    assert [index for index, _, _ in published] == [2, 3]
    assert {quality for _, _, quality in published} == {Quality.INT8}
