"""Promise 5: prefill -> store -> decode gives, token for token, what one process without a store gives.

Promise 1 beside it: whatever happens to the store on the way, a miss is all it costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.monolithic import generate
from engine.types import GenerationRequest, Handoff
from kvstore import failpoints
from kvstore.client import StoreClient
from kvstore.clock import ManualClock
from kvstore.errors import Unavailable
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import ShardId
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.base import Place
from kvstore.tiers.host import HostTier
from kvstore.topology import ShardEntry, Topology
from tests.role_parts import (
    BLOCK_TOKENS,
    CACHING,
    ENGINE,
    Pair,
    expire_leases,
    later,
    pair_over,
    prompt,
    request,
    shard,
)
from tests.tiny_model import make_tiny_model

LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40, 47, 48, 49, 63, 64, 95, 130, 200, 257)
assert len(LENGTHS) >= 20


class Reference:
    """What one process generates, each request computed once."""

    def __init__(self, folder: Path, config: EngineConfig = ENGINE) -> None:
        self.engine = Engine.load(folder, config)
        self._known: dict[GenerationRequest, tuple[int, ...]] = {}

    def __call__(self, asked: GenerationRequest) -> tuple[int, ...]:
        asked = replace(asked, request_id="r", attempt=1)
        if asked not in self._known:
            self._known[asked] = generate(self.engine, asked)
        return self._known[asked]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def requests(turn: str = "a", temperature: float = 0.0) -> list[GenerationRequest]:
    return [
        request(prompt(n, i), name=f"{turn}{n}", temperature=temperature, seed=i, max_tokens=3 + i % 17)
        for i, n in enumerate(LENGTHS)
    ]


USABLE_TOKENS = sum((n - 1) // BLOCK_TOKENS * BLOCK_TOKENS for n in LENGTHS)


async def assert_equal(pair: Pair, reference: Reference, asked: Sequence[GenerationRequest]) -> int:
    """All at once, so that they meet in batches of every shape; how many tokens came from the store."""
    firsts = await asyncio.gather(*(pair.prefill.prefill(one) for one in asked))
    handoffs = await asyncio.gather(*(pair.prefill.handoff(one.request_id, one.attempt) for one in asked))
    going_on = [handoff for handoff in handoffs if handoff is not None]
    assert len(going_on) == len(asked), "every request asks for more than one token"
    for one, tokens in zip(asked, await pair.decode_each(going_on), strict=True):
        assert tokens == reference(one), f"prompt of {len(one.prompt_ids)} tokens"
    return sum(first.stats.cached_tokens for first in firsts)


@pytest.mark.parametrize("engine", [ENGINE, CACHING], ids=["store", "pool"])
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
async def test_equal_to_one_process_cold_and_warm(
    folder: Path, reference: Reference, temperature: float, engine: EngineConfig
) -> None:
    """Also where all of it lies in the workers' own pools."""
    async with pair_over(folder, [shard("s0"), shard("s1"), shard("s2")], engine=engine) as pair:
        assert await assert_equal(pair, reference, requests("a", temperature)) == 0
        assert await assert_equal(pair, reference, requests("b", temperature)) == USABLE_TOKENS
        await pair.assert_nothing_held()


MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": 21}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "attention_bias": None}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize(("family", "dtype"), [(MISTRAL, "float16"), (QWEN2, "float32"), (QWEN3, "float16")])
async def test_every_family_is_equal_cold_and_warm(
    family: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    """Behind a window shorter than a block and a chunk, with biases, with normed heads, in float16."""
    folder = make_tiny_model(tmp_path, **family)
    config = ENGINE.model_copy(update={"dtype": dtype})
    reference = Reference(folder, config)
    async with pair_over(folder, [shard("s0"), shard("s1")], engine=config) as pair:
        assert await assert_equal(pair, reference, requests("a")) == 0
        assert await assert_equal(pair, reference, requests("b")) == USABLE_TOKENS


class RottingTier(HostTier):
    """Flips a byte of every k-th frame it is given, after the shard has verified it."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.writes = every, 0

    async def write(self, place: Place, frame: memoryview) -> None:
        self.writes += 1
        await super().write(place, frame)
        if self.writes % self.every == 0:
            self.flip_byte(place, HEADER_NBYTES + self.writes % 997)


@pytest.mark.parametrize("every", [1, 2, 5])
async def test_equal_when_stored_blocks_are_corrupt(folder: Path, reference: Reference, every: int) -> None:
    async with pair_over(folder, [shard(storage=RottingTier(every))]) as pair:
        for turn in "ab":
            await assert_equal(pair, reference, requests(turn))
        assert (await pair.decode.counters())["rejected:checksum"] > 0
        assert (await pair.prefill.counters())["rejected:checksum"] > 0
        await pair.assert_nothing_held()


async def test_equal_when_the_store_is_full(folder: Path, reference: Reference) -> None:
    frame_nbytes = HEADER_NBYTES + Engine.load(folder, ENGINE).layout.block_nbytes
    async with pair_over(folder, [shard(capacity_nbytes=5 * frame_nbytes)]) as pair:
        for turn in "ab":
            assert await assert_equal(pair, reference, requests(turn)) < USABLE_TOKENS / 4
        assert (await pair.prefill.counters())["refused:no_space"] > 0
        await pair.assert_nothing_held()


async def test_equal_when_a_shard_fails_in_the_middle_of_a_read(folder: Path, reference: Reference) -> None:
    async with pair_over(folder, [shard("s0"), shard("s1")]) as pair:
        await assert_equal(pair, reference, requests("a"))
        for after in (0, 3, 40):
            fail = failpoints.Fail(Unavailable("the shard went away"))
            with failpoints.armed("storage.read", fail, after=after, times=60):
                await assert_equal(pair, reference, requests(f"b{after}."))
        counters = await pair.decode.counters()
        assert counters["decode:recomputed_shard_unavailable"] > 0
        await pair.assert_nothing_held()


async def test_equal_when_the_leases_of_the_handoff_expired_and_its_blocks_are_gone(
    folder: Path, reference: Reference
) -> None:
    clock = ManualClock()
    frame_nbytes = HEADER_NBYTES + Engine.load(folder, ENGINE).layout.block_nbytes
    driver = shard(capacity_nbytes=12 * frame_nbytes, clock=clock)
    asked, others = request(prompt(70)), [request(prompt(90, seed), name=f"o{seed}") for seed in (1, 2)]
    async with pair_over(folder, [driver]) as pair:
        await pair.prefill.prefill(asked)
        handoff = await pair.prefill.handoff("r", 1)
        assert handoff is not None
        assert len(handoff.blocks) == 8
        assert expire_leases(driver, clock) > 0
        for other in others:
            await pair.generate(other)  # evicts what no lease protects any more
        assert await pair.decode_all(handoff) == reference(asked)
        counters = await pair.decode.counters()
        assert counters["decode:recomputed_stale_reference"] == 8
        await pair.assert_nothing_held()


async def test_the_next_turn_hits_what_decode_published(folder: Path, reference: Reference) -> None:
    """Promise: a turn's answer is in the store when the next turn comes, its last token aside."""
    async with pair_over(folder, [shard("s0"), shard("s1")]) as pair:
        spoken: tuple[int, ...] = prompt(45)
        for turn in range(3):
            asked = request(spoken, name=f"turn {turn}", max_tokens=30)
            first, output = await pair.generate(asked)
            assert output == reference(asked)
            known = 0 if turn == 0 else len(spoken) - 11 - 1  # all but the news and the last drawn token
            assert first.stats.cached_tokens == known // BLOCK_TOKENS * BLOCK_TOKENS
            assert first.stats.cached_by_tier == ({"host": first.stats.cached_tokens} if turn else {})
            assert await pair.workers[1].background.settle(5.0)
            spoken = (*spoken, *output, *prompt(11, seed=turn))
        await pair.assert_nothing_held()


async def test_a_later_attempt_goes_on_with_the_same_answer(folder: Path, reference: Reference) -> None:
    """Promise: a client sees one answer, whatever worker ends it, also when tokens are drawn at random."""
    asked = request(prompt(33), max_tokens=25, temperature=0.8, seed=5)
    whole = reference(asked)
    async with pair_over(folder, [shard()]) as pair:
        for cut in (1, 7, 15, 24):
            asked = replace(later(asked), output_ids=whole[:cut])
            first, output = await pair.generate(asked)
            assert first.event.index == cut
            assert output == whole
        await pair.assert_nothing_held()


async def test_equal_over_real_shards_of_which_one_dies(folder: Path, reference: Reference) -> None:
    """The same over gRPC on the loopback; then a shard is gone for good."""
    drivers = [shard("s0"), shard("s1")]
    async with AsyncExitStack() as stack:
        servers, entries = [], []
        for driver in drivers:
            server = ShardServer(driver, ServerConfig(token="a token"))
            entries.append(ShardEntry(ShardId(driver.shard), await server.start()))
            stack.push_async_callback(server.stop, 0.0)
            servers.append(server)

        async def connect(_topology: Topology) -> StoreClient:
            return await StoreClient.connect(Topology(1, tuple(entries)), token="a token")

        pair = await stack.enter_async_context(pair_over(folder, drivers, connect=connect))
        await assert_equal(pair, reference, requests("a"))
        assert await assert_equal(pair, reference, requests("b")) == USABLE_TOKENS
        await pair.assert_nothing_held()
        await servers[1].stop(0.0)
        left = await assert_equal(pair, reference, requests("c"))
        assert 0 < left < USABLE_TOKENS


async def test_a_handoff_serves_as_it_stands(folder: Path, reference: Reference) -> None:
    """What a handoff says is what decode needs: gapless blocks, the tail behind them, the next position."""
    async with pair_over(folder, [shard()]) as pair:
        handoffs: list[Handoff] = []
        for tokens in (5, 8, 20, 24):
            asked = request(prompt(tokens), name=f"r{tokens}")
            first = await pair.prefill.prefill(asked)
            handoff = await pair.prefill.handoff(asked.request_id, 1)
            assert handoff is not None
            assert handoff.request.output_ids == (first.event.token_id,)
            assert handoff.next_position == tokens
            assert len(handoff.blocks) == tokens // BLOCK_TOKENS
            assert (handoff.tail.tokens if handoff.tail else 0) == tokens % BLOCK_TOKENS
            handoffs.append(handoff)
        for handoff, output in zip(handoffs, await pair.decode_each(handoffs), strict=True):
            assert output == reference(replace(handoff.request, output_ids=()))
        assert (await pair.decode.counters())["engine:tokens_computed"] == 4 * 11, "nothing was recomputed"
        await pair.assert_nothing_held()
