"""The prefill role's promises: the first token early, an honest account of it, and nothing held too long."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import RequestAborted
from engine.types import FinishReason
from kvstore.client import StoreClient
from kvstore.clock import ManualClock
from kvstore.errors import ConfigError, DeadlineExceeded, NotFound, OverLimit, Unavailable
from kvstore.topology import Topology
from tests.gates import GatedEngine, GatedShard
from tests.role_parts import WAIT_S, later, over, pair_over, prompt, request, shard


async def test_the_first_token_comes_with_an_account_of_where_the_kv_came_from(folder: Path) -> None:
    clock = ManualClock(5.0)
    async with pair_over(folder, [shard(clock=clock)], clock=clock) as pair:
        cold = await pair.prefill.prefill(request(prompt(30)))
        assert (cold.stats.prompt_tokens, cold.stats.cached_tokens) == (30, 0)
        assert cold.stats.misses == {"absent": 3}
        assert cold.stats.epochs == (1,)
        await pair.prefill.handoff("r", 1)
        longer = await pair.prefill.prefill(request(prompt(30) + prompt(20, 1), name="s"))
        assert longer.stats.cached_tokens == 24
        assert longer.stats.cached_by_tier == {"host": 24}
        assert longer.stats.misses == {"absent": 3}, (
            "cached and missed blocks are all that could be asked for"
        )


async def test_the_same_prompt_again_is_cached_and_answered_alike(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        first, output = await pair.generate(request(prompt(50)))
        again, same = await pair.generate(request(prompt(50), name="again"))
        assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 48)
        assert same == output
        await pair.assert_nothing_held()


async def test_a_sequence_that_ends_with_its_first_token_has_no_handoff(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        first = await pair.prefill.prefill(request(prompt(20), max_tokens=1))
        assert first.event.finish is FinishReason.LENGTH
        assert await pair.prefill.handoff("r", 1) is None
        await pair.assert_nothing_held()


async def test_a_handoff_is_fetched_once_and_only_by_its_attempt(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        await pair.prefill.prefill(request(prompt(20)))
        with pytest.raises(NotFound):
            await pair.prefill.handoff("r", 2)
        handoff = await pair.prefill.handoff("r", 1)
        with pytest.raises(NotFound, match="prefill it again"):
            await pair.prefill.handoff("r", 1)
        assert handoff is not None
        await pair.decode_all(handoff)
        await pair.assert_nothing_held()


async def test_what_nobody_fetches_is_dropped_after_a_while(folder: Path) -> None:
    clock = ManualClock()
    async with pair_over(folder, [shard(clock=clock)], clock=clock, parked_s=30.0) as pair:
        await pair.prefill.prefill(request(prompt(20)))
        clock.advance(29.0)
        assert pair.prefill.sweep() == 0
        clock.advance(1.0)
        assert pair.prefill.sweep() == 1
        with pytest.raises(NotFound):
            await pair.prefill.handoff("r", 1)
        await pair.assert_nothing_held()


async def test_pins_that_grew_old_are_renewed_for_decode(folder: Path) -> None:
    clock = ManualClock()
    driver = shard(clock=clock)
    async with pair_over(folder, [driver], clock=clock, lease_s=10.0) as pair:
        await pair.prefill.prefill(request(prompt(20)))
        assert await pair.workers[0].background.settle(WAIT_S)
        for _ in range(8):
            clock.advance(1.0)
            driver.core.reap(clock.now())
        handoff = await pair.prefill.handoff("r", 1)
        assert handoff is not None
        for _ in range(5):  # beyond the first lease, within the renewed one
            clock.advance(1.0)
            driver.core.reap(clock.now())
        assert driver.core.leases == len(handoff.leases) > 0
        await pair.decode_all(handoff)
        await pair.assert_nothing_held()


async def test_a_newer_attempt_takes_the_place_of_an_older_one(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine_class=GatedEngine) as pair:
        engine = pair.engines[0]
        assert isinstance(engine, GatedEngine)
        engine.at = "step"
        older = asyncio.create_task(pair.prefill.prefill(request(prompt(20))))
        await engine.reached()
        newer = asyncio.create_task(pair.prefill.prefill(later(request(prompt(20)))))
        with pytest.raises(RequestAborted):
            await older
        engine.opened.set()
        assert (await newer).event.attempt == 2
        with pytest.raises(RequestAborted, match="superseded"):
            await pair.prefill.prefill(request(prompt(20)))
        await pair.prefill.abort("r", 1)
        assert await pair.prefill.handoff("r", 2) is not None, "an abort of the older is not the newer's"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", GatedShard.POINTS)
@pytest.mark.parametrize("how", ["abort", "cancel"])
async def test_giving_up_inside_any_call_of_the_store_leaves_nothing(
    folder: Path, call: str, when: str, how: str
) -> None:
    driver = GatedShard()
    async with pair_over(folder, [driver]) as pair:
        await pair.generate(request(prompt(20), name="before"))
        await pair.assert_nothing_held()
        driver.gate.at = f"{call} {when}"
        going = asyncio.create_task(pair.generate(request(prompt(20) + prompt(30, 1))))
        await driver.gate.reached()
        if how == "abort":
            await pair.prefill.abort("r", 1)
            await pair.decode.abort("r", 1)
        going.cancel()
        driver.gate.open()
        await asyncio.wait([going], timeout=WAIT_S)
        for role in (pair.prefill, pair.decode):  # what a router does at the end
            await role.abort("r", 1)
        await pair.assert_nothing_held()


@pytest.mark.parametrize("how", ["abort", "cancel"])
@pytest.mark.parametrize("call", ["admit", "step", "take_tail"])
async def test_giving_up_inside_any_call_of_the_engine_leaves_nothing(
    folder: Path, call: str, how: str
) -> None:
    async with pair_over(folder, [shard()], engine_class=GatedEngine) as pair:
        engine = pair.engines[0]
        assert isinstance(engine, GatedEngine)
        engine.at = call

        async def both() -> None:
            await pair.prefill.prefill(request(prompt(50)))
            await pair.prefill.handoff("r", 1)

        going = asyncio.create_task(both())
        await engine.reached()
        if how == "abort":
            await pair.prefill.abort("r", 1)
            with pytest.raises(RequestAborted):
                await going
        else:
            going.cancel()
            with pytest.raises(asyncio.CancelledError):
                await going
        engine.opened.set()
        await pair.assert_nothing_held()


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_giving_up_after_any_turn_of_the_event_loop_leaves_nothing(folder: Path, turns: int) -> None:
    async with pair_over(folder, [shard("s0"), shard("s1")]) as pair:
        going = asyncio.create_task(pair.generate(request(prompt(40), max_tokens=4)))
        for _ in range(turns):
            await asyncio.sleep(0)
        going.cancel()
        await asyncio.wait([going], timeout=WAIT_S)
        await pair.decode.abort("r", 1)
        await pair.prefill.abort("r", 1)
        await pair.assert_nothing_held()


async def test_an_abort_that_overtakes_its_prefill_ends_it_all_the_same(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        await pair.prefill.abort("r", 1)
        with pytest.raises(RequestAborted, match="aborted already"):
            await pair.prefill.prefill(request(prompt(20)))
        await pair.assert_nothing_held()
        await pair.prefill.prefill(request(prompt(20), attempt=2))


async def test_a_worker_that_holds_enough_refuses_more(folder: Path) -> None:
    async with pair_over(folder, [shard()], requests_max=1) as pair:
        await pair.prefill.prefill(request(prompt(20)))
        with pytest.raises(OverLimit, match="ask another"):
            await pair.prefill.prefill(request(prompt(20), name="second"))


async def test_computing_is_bounded(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine_class=GatedEngine, compute_timeout_s=0.05) as pair:
        engine = pair.engines[0]
        assert isinstance(engine, GatedEngine)
        engine.at = "step"
        with pytest.raises(DeadlineExceeded, match="no first token"):
            await pair.prefill.prefill(request(prompt(20)))
        engine.opened.set()
        await pair.assert_nothing_held()


async def test_what_never_fits_is_refused_as_the_askers_fault(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        with pytest.raises(ConfigError, match="shorten the prompt"):
            await pair.prefill.prefill(request(prompt(600)))
        await pair.assert_nothing_held()


async def test_draining_finishes_what_is_parked_and_takes_no_more(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        await pair.prefill.prefill(request(prompt(20)))
        draining = asyncio.create_task(pair.prefill.drain(WAIT_S))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="draining"):
            await pair.prefill.prefill(request(prompt(20), name="late"))
        handoff = await pair.prefill.handoff("r", 1)
        assert await draining is True
        assert handoff is not None
        await pair.decode_all(handoff)
        await pair.assert_nothing_held()


async def test_a_drain_that_takes_too_long_ends_what_is_left(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        await pair.prefill.prefill(request(prompt(20)))
        assert await pair.prefill.drain(0.01) is False
        await pair.assert_nothing_held()


async def test_a_store_that_is_down_costs_only_the_cache(folder: Path) -> None:
    """Promise: the service works without its store, and uses it as soon as it is there."""
    clock, up = ManualClock(), over([shard(clock=ManualClock())])
    reachable = False

    async def connect(topology: Topology) -> StoreClient:
        if not reachable:
            raise Unavailable("nobody listens")
        return await up(topology)

    async with pair_over(folder, [], connect=connect, clock=clock) as pair:
        asked = request(prompt(30))
        first, output = await pair.generate(asked)
        assert first.stats.misses == {"shard_unavailable": 3}
        reachable = True
        clock.advance(60.0)
        for turn in range(2):
            second, same = await pair.generate(replace(asked, request_id=f"turn {turn}"))
            assert same == output
            assert second.stats.cached_tokens == (24 if turn else 0)
