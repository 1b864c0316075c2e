"""What is announced comes up before it is asked for; an announcement pins nothing and is never an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore import announcements
from kvstore.core.state import Foresight
from kvstore.core.uses import Use, Uses
from kvstore.driver import ShardDriver
from kvstore.errors import NotFound, OverLimit
from kvstore.nouns import BlockKey, NamespaceId, Tier
from kvstore.transport.base import Purge
from tests.kvstore.oracle import FRAME_NBYTES, TIMEOUT, chain, get, new_driver, payload, put, refs_in
from tests.kvstore.prefetch.below import E1, MemoryTier, opened, put_below, sink, snapshot, tiered

HOST, NVME = int(Tier.HOST), int(Tier.NVME)


class World:
    driver: ShardDriver
    below: MemoryTier
    namespace: NamespaceId

    async def start(self, **changes: object) -> World:
        self.driver, self.below = tiered(**changes)  # type: ignore[arg-type]
        self.namespace = await opened(self.driver)
        return self


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """The mover's own task is started by the tests that want it."""
    made = await World().start()
    yield made
    made.below.gate.set()
    await made.driver.close()
    made.driver.check_integrity()


async def test_what_lies_below_comes_up_and_is_what_it_was(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 3)
    await world.driver.start()
    told = await world.driver.announce(snapshot(world.namespace), made.keys, 0.0, timeout_s=TIMEOUT)
    assert (list(told.tiers), told.coming, told.coming_nbytes) == ([NVME] * 3, 3, 3 * FRAME_NBYTES)
    told = await world.driver.announce(snapshot(world.namespace), made.keys, 2.0, timeout_s=TIMEOUT)
    assert (list(told.tiers), told.coming) == ([HOST] * 3, 0)
    assert told.promotion_nbytes_s > 0
    matched = await world.driver.match(snapshot(world.namespace), made.keys, "r", 5.0, timeout_s=TIMEOUT)
    assert list(matched.tiers) == [HOST] * 3
    refs = refs_in(matched)
    assert await get(world.driver, world.namespace, refs) == [payload(key, E1) for key in made.keys]
    assert matched.lease is not None
    await world.driver.release([matched.lease], timeout_s=TIMEOUT)


async def test_it_names_the_run_a_match_would_find_and_no_more(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 2)
    asked = [made.keys[0], BlockKey(bytes(32)), made.keys[1]]
    told = await world.driver.announce(snapshot(world.namespace), asked, 0.0, timeout_s=TIMEOUT)
    assert (list(told.tiers), told.coming) == ([NVME], 1)
    with pytest.raises(NotFound):
        await world.driver.announce(snapshot(NamespaceId(bytes(16))), asked, 0.0, timeout_s=TIMEOUT)
    with pytest.raises(OverLimit):
        await world.driver.announce(snapshot(world.namespace), asked * 8_192, 0.0, timeout_s=TIMEOUT)


async def test_it_pins_nothing_and_is_no_use(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 2)
    uses = bytes(world.driver.core.index.uses.counts)
    await world.driver.announce(snapshot(world.namespace), made.keys, 0.0, timeout_s=TIMEOUT)
    assert world.driver.core.leases == 0
    assert bytes(world.driver.core.index.uses.counts) == uses


async def test_the_first_blocks_come_first_however_often_they_are_announced(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 4)
    for _ in range(2):
        await world.driver.announce(snapshot(world.namespace), made.keys, 0.0, timeout_s=TIMEOUT)
    await world.driver.announce(snapshot(world.namespace), made.keys[:1], 0.0, timeout_s=TIMEOUT)
    started = world.driver.core.moves.start(0.0, 1 << 20)
    assert [move.source.chain_index for move in started] == [0, 1, 2, 3]
    for move in started:
        world.driver.core.moves.failed(move)


async def test_what_the_host_could_never_hold_beside_the_rest_stays_below(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 3)
    world.driver.core.index.host.capacity_nbytes = 2 * FRAME_NBYTES
    told = await world.driver.announce(snapshot(world.namespace), made.keys, 0.0, timeout_s=TIMEOUT)
    assert (len(told.tiers), told.coming) == (3, 2)
    assert world.driver.core.counters["prefetch:beyond_host"] == 1


async def test_a_wait_ends_with_the_last_move(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 2)
    world.below.gate.clear()
    await world.driver.start()
    waiting = asyncio.create_task(
        world.driver.announce(snapshot(world.namespace), made.keys, 60.0, timeout_s=120.0)
    )
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    world.below.gate.set()
    told = await waiting
    assert (list(told.tiers), told.coming) == ([HOST, HOST], 0)


async def test_a_wait_that_is_over_is_no_error(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 2)
    world.below.gate.clear()
    await world.driver.start()
    for wait_s, timeout_s in ((0.01, TIMEOUT), (60.0, 0.02)):
        told = await world.driver.announce(snapshot(world.namespace), made.keys, wait_s, timeout_s=timeout_s)
        assert (list(told.tiers), told.coming, told.coming_nbytes) == ([NVME] * 2, 2, 2 * FRAME_NBYTES)


async def test_those_who_wait_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcements, "WAITING_MAX", 1)
    made = await put_below(world.driver, world.namespace, 1)
    world.below.gate.clear()
    await world.driver.start()
    waiting = asyncio.create_task(
        world.driver.announce(snapshot(world.namespace), made.keys, 60.0, timeout_s=120.0)
    )
    await asyncio.sleep(0)
    told = await world.driver.announce(snapshot(world.namespace), made.keys, 60.0, timeout_s=120.0)
    assert told.coming == 1
    assert world.driver.core.counters["announcements_not_waited"] == 1
    world.below.gate.set()
    assert (await waiting).coming == 0


async def test_what_is_purged_on_its_way_is_waited_for_no_more(world: World) -> None:
    made = await put_below(world.driver, world.namespace, 1)
    world.below.gate.clear()
    await world.driver.start()
    waiting = asyncio.create_task(
        world.driver.announce(snapshot(world.namespace), made.keys, 60.0, timeout_s=120.0)
    )
    await asyncio.sleep(0)
    await world.driver.purge(Purge(world.namespace, tuple(made.keys)), timeout_s=TIMEOUT)
    world.below.gate.set()
    told = await waiting
    assert (list(told.tiers), told.coming) == ([], 0)


async def test_a_shard_without_a_tier_below_answers_at_once(world: World) -> None:
    driver = new_driver()
    namespace = await opened(driver)
    made = chain(namespace, 2)
    await put(driver, made, [0, 1], E1)
    told = await driver.announce(snapshot(namespace), made.keys, 60.0, timeout_s=120.0)
    assert (list(told.tiers), told.coming, told.promotion_nbytes_s) == ([HOST, HOST], 0, 0.0)


async def test_what_a_predictor_says_comes_up_at_the_shards_own_tick() -> None:
    class Sure:
        def __init__(self, uses: Uses) -> None:
            del uses

        def observe(self, use: Use) -> None:
            """Nothing can change its mind."""

        def probability(self, slot: int, within_s: float, now: float) -> float:
            return 1.0

    driver, _ = tiered(make_predictor=Sure, foresight=Foresight(share=0.5))
    namespace = await opened(driver)
    made = await put_below(driver, namespace, 3)
    await driver.start()
    await driver.tick()
    assert driver.mover is not None
    slots = [version.ref for version in driver.core.index.rows()]
    await driver.mover.wait_for(slots, TIMEOUT)
    matched = await driver.match(snapshot(namespace), made.keys, "r", 5.0, timeout_s=TIMEOUT)
    assert list(matched.tiers) == [HOST] * 3
    assert driver.core.counters["prefetch:predicted_in_time"] == 3
    await driver.release([matched.lease], timeout_s=TIMEOUT)  # type: ignore[list-item]
    await driver.close()


async def outcomes(driver: ShardDriver) -> dict[str, int]:
    return {
        name.removeprefix("prefetch:announced_"): count
        for name, count in driver.core.counters.items()
        if name.startswith("prefetch:announced") and not name.endswith("nbytes") and count
    }


async def test_it_is_told_what_came_of_each_block(world: World) -> None:
    driver, space = world.driver, snapshot(world.namespace)
    assert driver.mover is not None
    made = await put_below(driver, world.namespace, 2)
    other = await put_below(driver, world.namespace, 1, first=2000)
    await driver.announce(space, made.keys, 0.0, timeout_s=TIMEOUT)
    await driver.announce(space, made.keys, 0.0, timeout_s=TIMEOUT)
    early = await driver.match(space, made.keys[:1], "r", 5.0, timeout_s=TIMEOUT)
    assert await outcomes(driver) == {"blocks": 2, "late": 1}
    await driver.mover.step()
    intime = await driver.match(space, made.keys, "r", 5.0, timeout_s=TIMEOUT)
    assert await outcomes(driver) == {"blocks": 2, "late": 1, "in_time": 1}
    await driver.release([early.lease, intime.lease], timeout_s=TIMEOUT)  # type: ignore[list-item]
    await driver.announce(space, other.keys, 0.0, timeout_s=TIMEOUT)
    await driver.mover.step()
    await sink(driver, other.keys)
    driver.core.look_ahead(0.0)
    assert await outcomes(driver) == {"blocks": 3, "late": 1, "in_time": 1, "wasted": 1}
    assert len(driver.core.foreseen) == 0
