"""Blocks of one worker's pool into another's, as whoever steers workers asks for it: by the roles, over
gRPC."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.engine import Engine
from engine.monolithic import generate
from kvstore.errors import ConfigError, Unavailable
from kvstore.hashing import KeyChain
from kvstore.nouns import BlockKey, ShardId
from kvstore.topology import ShardEntry
from tests.role_parts import BLOCK_TOKENS, CACHING, ENGINE, Pair, pair_over, prompt, request, shard


async def keys_of(pair: Pair, tokens: tuple[int, ...]) -> list[BlockKey]:
    session = await pair.workers[0].store.session("default")
    assert session is not None
    chain = KeyChain(session.namespace, BLOCK_TOKENS)
    chain.extend(tokens)
    return chain.keys


async def test_a_worker_uses_what_it_pulled_from_another_and_answers_alike(folder: Path) -> None:
    asked = request(prompt(64), max_tokens=20)
    expected = generate(Engine.load(folder, ENGINE), asked)
    async with (
        pair_over(folder, [home := shard()], engine=CACHING) as there,
        pair_over(folder, [home], engine=CACHING) as here,
    ):
        await there.workers[0].serve_edge("127.0.0.1", None)
        source = ShardEntry(ShardId("edge-p0"), there.workers[0].info.edge_address)
        await there.generate(asked)
        keys = await keys_of(here, asked.prompt_ids)
        assert await here.prefill.pull("default", [*keys, BlockKey(bytes(32))], source, 20.0) == 8
        assert (await here.prefill.counters())["edge:not_pulled_absent"] == 1
        assert await here.decode.pull("default", keys, source, 20.0) == 8
        assert await here.decode.pull("default", keys, source, 20.0) == 8, "a second time nothing moves"
        read = here.workers[1].store.client_counters["verified_blocks"]
        first, output = await here.generate(asked)
        assert output == expected
        assert first.stats.cached_by_tier == {"device": 56}
        assert here.workers[1].store.client_counters["verified_blocks"] == read
        await here.assert_nothing_held()
        await there.assert_nothing_held()


async def test_a_source_that_is_not_there_costs_misses(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine=CACHING) as pair:
        await pair.generate(request(prompt(20)))
        keys = await keys_of(pair, prompt(64, 1))
        nobody = ShardEntry(ShardId("edge-gone"), "127.0.0.1:1")
        assert await pair.prefill.pull("default", keys, nobody, 1.0) == 0
        counters = await pair.prefill.counters()
        assert sum(n for name, n in counters.items() if name.startswith("edge:not_pulled_")) == 8
        await pair.assert_nothing_held()


async def test_without_a_cache_nothing_is_pulled_or_served(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        with pytest.raises(Unavailable, match="local_cache = true"):
            await pair.prefill.pull("default", [], ShardEntry(ShardId("x"), "127.0.0.1:1"), 1.0)
        with pytest.raises(ConfigError, match="local_cache = true"):
            await pair.workers[0].serve_edge("127.0.0.1", None)


async def test_a_pool_is_served_on_loopback_only(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine=CACHING) as pair:
        with pytest.raises(ConfigError, match="not a loopback address"):
            await pair.workers[0].serve_edge("0.0.0.0", None)
