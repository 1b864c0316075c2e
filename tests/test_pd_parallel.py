"""Promise: workers over two ranks store and read a block of each rank's own, and use what both have."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import RanksLost
from engine.monolithic import generate
from engine.parallel.session import RankedSession, key_chain
from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.errors import ConfigError
from kvstore.nouns import BlockKey, NamespaceId
from tests.role_parts import BLOCK_TOKENS, CACHING, ENGINE, Pair, pair_over, prompt, request, shard

PARALLEL = CACHING.model_copy(update={"tensor_parallel": 2})


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Engine:
    return Engine.load(folder, ENGINE)


@pytest.fixture
def shards() -> list[ShardDriver]:
    return [shard("s0"), shard("s1")]


@pytest.fixture
async def pair(folder: Path, shards: list[ShardDriver]) -> AsyncIterator[Pair]:
    async with pair_over(folder, shards, engine=PARALLEL) as pair:
        yield pair


async def keys_of(pair: Pair, tokens: tuple[int, ...]) -> dict[NamespaceId, list[BlockKey]]:
    """Of each rank's namespace."""
    session = await pair.workers[0].store.session("default")
    assert isinstance(session, RankedSession)
    chain = key_chain(session, BLOCK_TOKENS)
    chain.extend(tokens)
    first, second = session.namespaces
    return {first: [*chain.keys], second: [key.others[0] for key in chain.keys]}  # type: ignore[attr-defined]


async def test_every_block_goes_from_prefill_to_decode_and_comes_back(
    pair: Pair, folder: Path, shards: list[ShardDriver], one_process: Engine
) -> None:
    asked = request(prompt(61), max_tokens=20)
    expected = generate(one_process, asked)
    first, tokens = await pair.generate(asked)
    assert tokens == expected
    assert first.stats.cached_tokens == 0
    counters = await pair.decode.counters()
    assert counters["decode:onboarded_blocks"] == 7, "decode computed what prefill has left for it"
    assert not [name for name in counters if name.startswith(("decode:recomputed", "decode:tails_rejected"))]
    await pair.assert_nothing_held()
    again = request((*asked.prompt_ids, *tokens, *prompt(3, seed=9)), name="next turn")
    first, tokens = await pair.generate(again)
    assert first.stats.cached_tokens == 80, "what decode has published is not found"
    assert tokens == generate(one_process, again)
    for namespace, keys in (await keys_of(pair, asked.prompt_ids)).items():
        pages = [page async for page in StoreClient.over(shards).listing(namespace)]
        stored = [listed.key for page in pages for listed in page.versions]
        assert [stored.count(key) for key in keys] == [1] * 7, "not once a rank, under its own name"
    async with pair_over(folder, shards) as single:
        first, _ = await single.generate(asked)
        assert first.stats.cached_tokens == 0, "other divisions of the heads have met"
        await single.assert_nothing_held()


async def test_ranks_use_the_shortest_match(
    pair: Pair, shards: list[ShardDriver], one_process: Engine
) -> None:
    asked = request(prompt(61), max_tokens=6)
    expected = generate(one_process, asked)
    await pair.generate(asked)
    (_, second), (namespace, keys) = (await keys_of(pair, asked.prompt_ids)).items()
    assert second != keys
    for driver in shards:
        await StoreClient.over([driver]).purge(namespace=namespace, keys=keys[4:])
    first, tokens = await pair.generate(request(asked.prompt_ids, name="again", max_tokens=6))
    assert first.stats.cached_tokens == 4 * BLOCK_TOKENS
    assert tokens == expected
    await pair.assert_nothing_held()


async def test_weights_stay_and_a_lost_rank_asks_for_another_worker(pair: Pair, folder: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel"):
        await pair.prefill.prepare_weights(str(folder), 2)
    await pair.prefill.prefill(request(prompt(20), name="before"))
    ranks = pair.engines[0].ranks
    assert ranks is not None
    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(RanksLost, match="SIGKILL"):
        await pair.prefill.prefill(request(prompt(61)))
    with pytest.raises(RanksLost, match="SIGKILL"):
        await pair.prefill.counters()
