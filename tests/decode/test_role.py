"""The decode role's promises: a handoff is used or recomputed, leases go back, errors stay with their own."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.types import FinishReason, GenerationRequest, Handoff
from kvstore.errors import EpochConflict, OverLimit, Unavailable
from kvstore.nouns import Epoch, NamespaceId, WeightsDigest
from tests.gates import GatedEngine, GatedShard
from tests.role_parts import ENGINE, WAIT_S, Pair, later, pair_over, prompt, request, shard


async def handed_off(pair: Pair, asked: GenerationRequest) -> Handoff:
    await pair.prefill.prefill(asked)
    handoff = await pair.prefill.handoff(asked.request_id, asked.attempt)
    assert handoff is not None
    return handoff


def gated(pair: Pair) -> GatedEngine:
    engine = pair.engines[1]
    assert isinstance(engine, GatedEngine)
    return engine


async def test_the_leases_go_back_as_soon_as_the_blocks_are_in_the_engine(folder: Path) -> None:
    driver = shard()
    async with pair_over(folder, [driver], engine_class=GatedEngine) as pair:
        handoff = await handed_off(pair, request(prompt(40)))
        assert await pair.workers[0].background.settle(WAIT_S)
        assert driver.core.leases == len(handoff.leases) > 0, "prefill keeps none, and takes none back"
        engine = gated(pair)
        engine.at = "step"
        await pair.decode.start(handoff)
        await engine.reached()  # it computes already: what it needs of the store is in its own pool
        assert await pair.workers[1].background.settle(WAIT_S)
        assert driver.core.leases == 0
        engine.opened.set()
        await pair.events_of(["r"])
        await pair.assert_nothing_held()


def broken_byte(handoff: Handoff) -> Handoff:
    assert handoff.tail is not None
    payload = handoff.tail.payload.copy()
    payload[3] ^= 1
    return replace(handoff, tail=replace(handoff.tail, payload=payload))


def cut_short(handoff: Handoff) -> Handoff:
    assert handoff.tail is not None
    return replace(handoff, tail=replace(handoff.tail, payload=np.zeros(3, np.uint8)))


def without_tail(handoff: Handoff) -> Handoff:
    return replace(handoff, tail=None)


def without_first_blocks(handoff: Handoff) -> Handoff:
    return replace(handoff, blocks=handoff.blocks[:1])


def of_another_tenant(handoff: Handoff) -> Handoff:
    return replace(handoff, namespace=NamespaceId(b"another tenant's"))


@pytest.mark.parametrize(
    "damage", [broken_byte, cut_short, without_tail, without_first_blocks, of_another_tenant]
)
async def test_what_a_handoff_lacks_or_lies_about_is_recomputed(folder: Path, damage: object) -> None:
    async with pair_over(folder, [shard()]) as pair:
        _, expected = await pair.generate(request(prompt(45), name="whole"))
        handoff = await handed_off(pair, request(prompt(45)))
        assert callable(damage)
        assert await pair.decode_all(damage(handoff)) == expected
        await pair.assert_nothing_held()


async def test_a_handoff_of_other_weights_is_refused_and_its_leases_given_back(folder: Path) -> None:
    """Promise 3: new weights never meet old KV."""
    async with pair_over(folder, [shard()]) as pair:
        handoff = await handed_off(pair, request(prompt(45)))
        other = Epoch(handoff.epoch.number, WeightsDigest(bytes(16)))
        with pytest.raises(EpochConflict, match="pair workers of one epoch"):
            await pair.decode.start(replace(handoff, epoch=other))
        await pair.assert_nothing_held()


async def test_a_newer_attempt_supersedes_the_older_whose_events_are_dropped(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine_class=GatedEngine) as pair:
        older = await handed_off(pair, request(prompt(20), max_tokens=100))
        newer = await handed_off(pair, later(request(prompt(20), max_tokens=6)))
        await pair.decode.start(older)
        await pair.decode.poll(0, WAIT_S)  # it runs
        await pair.decode.start(newer)
        await pair.decode.start(older)  # told late: changes nothing
        await pair.decode.start(newer)  # told twice: neither
        events = (await pair.events_of(["r"]))["r"]
        assert {event.attempt for event in events} == {2}
        assert [event.index for event in events] == [1, 2, 3, 4, 5]
        await pair.assert_nothing_held()


@pytest.mark.parametrize("call", ["admit", "step"])
async def test_an_abort_inside_any_call_of_the_engine_leaves_nothing(folder: Path, call: str) -> None:
    async with pair_over(folder, [shard()], engine_class=GatedEngine) as pair:
        handoff = await handed_off(pair, request(prompt(20)))
        engine = gated(pair)
        engine.at = call
        await pair.decode.start(handoff)
        await engine.reached()
        await pair.decode.abort("r", 1)
        engine.opened.set()
        await pair.assert_nothing_held()


async def test_an_abort_that_overtakes_its_start_ends_it_all_the_same(folder: Path) -> None:
    async with pair_over(folder, [shard()]) as pair:
        handoff = await handed_off(pair, request(prompt(20), max_tokens=400))
        await pair.decode.abort("r", 1)
        await pair.decode.start(handoff)
        await pair.assert_nothing_held()
        again = replace(handoff.request, attempt=2)
        await pair.decode.start(await handed_off(pair, again))
        await pair.events_of(["r"])
        await pair.assert_nothing_held()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["read", "begin", "write", "commit", "release"])
async def test_an_abort_inside_any_call_of_the_store_leaves_nothing(
    folder: Path, call: str, when: str
) -> None:
    driver = GatedShard()
    async with pair_over(folder, [driver]) as pair:
        handoff = await handed_off(pair, request(prompt(20), max_tokens=30))
        driver.gate.at = f"{call} {when}"
        await pair.decode.start(handoff)
        await driver.gate.reached()
        await pair.decode.abort("r", 1)
        driver.gate.open()
        await pair.assert_nothing_held()


async def test_a_failed_step_is_the_last_event_of_what_ran_and_the_worker_goes_on(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine_class=GatedEngine) as pair:
        handoffs = [await handed_off(pair, request(prompt(20), name=name)) for name in ("a", "b")]
        gated(pair).error = RuntimeError("a bit fell over")
        await pair.decode.start(handoffs[0])
        (event,) = (await pair.events_of(["a"]))["a"]
        assert (event.finish, event.index) == (FinishReason.ERROR, 1)
        assert event.error is not None
        assert "a bit fell over" in event.error
        assert len(await pair.decode_all(handoffs[1])) == 12
        await pair.assert_nothing_held()


async def test_what_finds_no_room_in_time_ends_in_an_error_of_its_own(folder: Path) -> None:
    few = ENGINE.model_copy(update={"pool_blocks": 8})
    options: dict[str, Any] = {"engine": few, "admit_timeout_s": 0.05, "engine_class": GatedEngine}
    async with pair_over(folder, [shard()], **options) as pair:
        runs = await handed_off(pair, request(prompt(20), name="runs", max_tokens=44))  # all eight blocks
        waits = await handed_off(pair, request(prompt(20), name="waits"))
        engine = gated(pair)
        engine.at = "step"
        await pair.decode.start(runs)
        await engine.reached()
        await pair.decode.start(waits)
        (event,) = (await pair.events_of(["waits"]))["waits"]
        assert (event.finish, event.index) == (FinishReason.ERROR, 1)
        assert "no room" in str(event.error)
        engine.opened.set()
        assert (await pair.events_of(["runs"]))["runs"][-1].finish is FinishReason.LENGTH
        await pair.assert_nothing_held()


async def test_a_full_or_draining_worker_refuses_and_gives_the_leases_back(folder: Path) -> None:
    async with pair_over(folder, [shard()], requests_max=1, engine_class=GatedEngine) as pair:
        first = await handed_off(pair, request(prompt(20), name="first"))
        second = await handed_off(pair, request(prompt(20), name="second"))
        third = await handed_off(pair, request(prompt(20), name="third"))
        engine = gated(pair)
        engine.at = "step"
        await pair.decode.start(first)
        with pytest.raises(OverLimit):
            await pair.decode.start(second)
        draining = asyncio.create_task(pair.decode.drain(WAIT_S))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="draining"):
            await pair.decode.start(third)
        engine.opened.set()
        assert (await pair.events_of(["first"]))["first"][-1].finish is FinishReason.LENGTH
        assert await draining is True
        await pair.assert_nothing_held()


async def test_a_drain_that_takes_too_long_tells_those_that_are_left(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine_class=GatedEngine) as pair:
        handoff = await handed_off(pair, request(prompt(20)))
        engine = gated(pair)
        engine.at = "step"
        await pair.decode.start(handoff)
        await engine.reached()
        assert await pair.decode.drain(0.01) is False
        (event,) = (await pair.events_of(["r"]))["r"]
        assert "resume elsewhere" in str(event.error)
        engine.opened.set()
        await pair.assert_nothing_held()
