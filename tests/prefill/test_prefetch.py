"""Prompts that wait are announced, blocks come from below, and the gate changes no token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from engine.gate import TRUSTED_AFTER, LoadGate
from kvstore.core.state import DemoteWhen, Tiering
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.nouns import ShardId, Tier
from kvstore.tiers.host import HostTier
from kvstore.transport.base import Announced
from tests.gates import GatedShard
from tests.kvstore.prefetch.below import MemoryTier, sink
from tests.role_parts import BLOCK_TOKENS, SECRET, WAIT_S, Pair, pair_over, prompt, request


@asynccontextmanager
async def pair_over_tiers(
    folder: Path, **options: Any
) -> AsyncIterator[tuple[Pair, ShardDriver, MemoryTier]]:
    """Both roles over one shard with a tier below its host."""
    options = {"load_gate": True} | options
    tiering, below = Tiering(64 << 20, DemoteWhen.COMMITTED), MemoryTier()
    config = DriverConfig(ShardId("s0"), 64 << 20, SECRET, tiering=tiering)
    driver = ShardDriver(config, HostTier(), durable=below)
    await driver.start()
    try:
        async with pair_over(folder, [driver], **options) as pair:
            yield pair, driver, below
    finally:
        below.gate.set()
        await driver.close()


def teach(gate: LoadGate, *, block_s: float, token_s: float) -> None:
    for tier in (Tier.HOST, Tier.NVME):
        for i in range(10 * TRUSTED_AFTER):
            gate.loaded([tier] * (5 + i % 4), 5 + i % 4, (5 + i % 4) * block_s)
            gate.computed(0, 400, 400 * token_s)


async def settled(pair: Pair) -> None:
    for worker in pair.workers:
        assert await worker.background.settle(WAIT_S)


async def test_a_router_announces_a_prompt_and_it_comes_up(folder: Path) -> None:
    async with pair_over_tiers(folder) as (pair, driver, _):
        _, output = await pair.generate(request(prompt(50)))
        await settled(pair)
        await sink(driver)
        await pair.prefill.announce(request(prompt(50), attempt=0))
        await settled(pair)
        counters = await pair.prefill.counters()
        assert (counters["prefetch:announced_requests"], counters["prefetch:announced_blocks"]) == (1, 6)
        assert counters["prefetch:coming_blocks"] == 6
        assert driver.mover is not None
        await driver.mover.wait_for([v.ref for v in driver.core.index.rows()], WAIT_S)
        again, same = await pair.generate(request(prompt(50), name="again"))
        assert again.stats.cached_by_tier == {"host": 48}
        assert same == output
        assert driver.core.counters["prefetch:announced_in_time"] == 6
        await settled(pair)


class Listening(GatedShard):
    """Tells when something is announced to it."""

    def __init__(self) -> None:
        super().__init__()
        self.announced = asyncio.Event()

    async def announce(self, *args: Any, **kwargs: Any) -> Announced:
        self.announced.set()
        return await super().announce(*args, **kwargs)


async def test_a_prompt_that_waits_its_turn_is_announced_meanwhile(folder: Path) -> None:
    gated = Listening()
    async with pair_over(folder, [gated], loading_max=1) as pair:
        gated.gate.at = "match after"
        first = asyncio.create_task(pair.prefill.prefill(request(prompt(30), name="first")))
        await gated.gate.reached()
        second = asyncio.create_task(pair.prefill.prefill(request(prompt(40), name="second")))
        worker = pair.workers[0]
        async with asyncio.timeout(WAIT_S):
            await gated.announced.wait()
        assert not first.done()
        assert not second.done()
        gated.gate.open()
        for name, asked in (("first", first), ("second", second)):
            await asked
            assert await pair.prefill.handoff(name, 1) is not None
        assert worker.announcer.counters["prefetch:announced_requests"] == 1, "the first need not wait"


async def test_a_store_that_does_not_answer_costs_a_waiting_prompt_nothing(folder: Path) -> None:
    async with pair_over_tiers(folder, announcing_max=1) as (pair, driver, _):
        announced, answering = asyncio.Event(), asyncio.Event()

        async def silent(*_: Any, **__: Any) -> Any:
            announced.set()
            await answering.wait()
            raise AssertionError("a bug of the shard's")

        driver.announce = silent  # type: ignore[method-assign]
        async with asyncio.timeout(WAIT_S):
            for _ in range(2):
                await pair.prefill.announce(request(prompt(50)))
            await announced.wait()
            await pair.generate(request(prompt(50)))
        assert (await pair.prefill.counters())["prefetch:dropped_requests"] == 1
        answering.set()


async def test_none_are_announced_where_that_is_turned_off(folder: Path) -> None:
    async with pair_over_tiers(folder, announcing_max=0) as (pair, driver, _):
        await pair.prefill.announce(request(prompt(50)))
        await settled(pair)
        assert driver.core.counters["announced_keys"] == 0
        assert (await pair.prefill.counters()).get("prefetch:dropped_requests", 0) == 0


async def test_blocks_that_are_slower_to_load_are_computed_and_no_token_changes(folder: Path) -> None:
    async with pair_over_tiers(folder) as (pair, driver, _):
        _, output = await pair.generate(request(prompt(50)))
        await settled(pair)
        await sink(driver)
        gate = pair.workers[0].gate
        teach(gate, block_s=1.0, token_s=1e-3)
        first, same = await pair.generate(request(prompt(50), name="gated"))
        assert same == output
        assert first.stats.cached_tokens == 0
        assert first.stats.misses == {"gated": 6}, "each block that could be asked for is accounted for"
        assert (await pair.prefill.counters())["gate:blocks"] == 6
        teach(gate, block_s=1e-6, token_s=1e-3)
        loaded, same = await pair.generate(request(prompt(50), name="loaded"))
        assert same == output
        assert (loaded.stats.cached_tokens, loaded.stats.misses) == (6 * BLOCK_TOKENS, {})
        await settled(pair)
        await pair.assert_nothing_held()


async def test_of_a_run_over_two_tiers_the_slow_part_is_computed(folder: Path) -> None:
    async with pair_over_tiers(folder) as (pair, driver, _):
        _, output = await pair.generate(request(prompt(50)))
        await settled(pair)
        await sink(driver)
        await pair.prefill.announce(request(prompt(50)[:24], attempt=0))
        await settled(pair)
        assert driver.mover is not None
        await driver.mover.wait_for([v.ref for v in driver.core.index.rows()], WAIT_S)
        gate = pair.workers[0].gate
        teach(gate, block_s=1e-6, token_s=1e-2)
        for blocks in (1, 2, 3) * 10:
            gate.loaded([Tier.NVME] * blocks, blocks, 9.0 * blocks)
        first, same = await pair.generate(request(prompt(50), name="gated"))
        assert same == output
        assert first.stats.cached_by_tier == {"host": 3 * BLOCK_TOKENS}
        assert first.stats.misses == {"gated": 3}
        await settled(pair)


async def test_a_gate_that_is_off_loads_whatever_it_costs(folder: Path) -> None:
    async with pair_over_tiers(folder, load_gate=False) as (pair, driver, _):
        await pair.generate(request(prompt(50)))
        await settled(pair)
        await sink(driver)
        teach(pair.workers[0].gate, block_s=1.0, token_s=1e-3)
        first, _ = await pair.generate(request(prompt(50), name="again"))
        assert first.stats.cached_by_tier == {"nvme": 48}
        await settled(pair)


async def test_a_worker_measures_what_loading_and_computing_cost(folder: Path) -> None:
    async with pair_over_tiers(folder) as (pair, _, __):
        for number in range(TRUSTED_AFTER + 1):
            await pair.generate(request(prompt(50), name=f"r{number}"))
        gauges = await pair.prefill.counters()
        assert gauges["gauge:load_host_read_s"] + gauges["gauge:load_host_block_s"] > 0
        assert gauges["gauge:prefill_token_s"] > 0
        await settled(pair)
