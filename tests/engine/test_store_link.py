"""A worker's way to the store: made when needed, tried again in bounded steps, never in the way."""

from __future__ import annotations

import asyncio

import pytest

from engine.background import Background
from engine.store_link import StoreLink
from kvstore.client import StoreClient
from kvstore.clock import ManualClock
from kvstore.driver import ShardDriver
from kvstore.errors import Unavailable
from kvstore.nouns import Epoch, KVLayout, LeaseId, NamespaceSpec, ShardId, WeightsDigest
from kvstore.topology import Topology
from tests.role_parts import WAIT_S, shard

SPEC = NamespaceSpec("m", KVLayout(1, 0, 1, 4, "float32"), bytes(16))
EPOCH = Epoch(1, WeightsDigest(bytes(16)))


class Store:
    """A store that is there or not, and counts who asked."""

    def __init__(self) -> None:
        self.shards: list[ShardDriver] = []
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def connect(self, _topology: Topology) -> StoreClient:
        self.asked += 1
        await self.gate.wait()
        if not self.shards:
            raise Unavailable("nobody listens")
        return StoreClient.over(self.shards)


def link(store: Store, clock: ManualClock, background: Background, *, timeout_s: float = WAIT_S) -> StoreLink:
    return StoreLink(
        store.connect,
        Topology(0, ()),
        SPEC,
        EPOCH,
        background,
        clock,
        connect_timeout_s=timeout_s,
        retry_s=1.0,
        retry_s_max=4.0,
    )


async def test_a_store_that_is_away_is_asked_again_in_bounded_steps() -> None:
    store, clock = Store(), ManualClock()
    way = link(store, clock, Background())
    asked_at = []
    for _ in range(20):
        before = store.asked
        assert await way.session("a") is None
        asked_at += [clock.now()] * (store.asked - before)
        clock.advance(1.0)
    assert asked_at == [0.0, 1.0, 3.0, 7.0, 11.0, 15.0, 19.0]
    assert way.counters["store:open_failed"] == 7
    store.shards = [shard()]
    clock.advance(4.0)
    assert await way.session("a") is not None


async def test_a_newer_topology_is_reason_to_ask_at_once() -> None:
    store = Store()
    way = link(store, ManualClock(), Background())
    assert await way.session("a") is None
    store.shards = [shard()]
    assert await way.session("a") is None, "asked just now"
    await way.set_topology(Topology(1, ()))
    assert await way.session("a") is not None


async def test_the_first_requests_all_wait_for_the_one_that_connects() -> None:
    store = Store()
    store.shards = [shard()]
    store.gate.clear()
    way = link(store, ManualClock(), Background())
    waiting = [asyncio.create_task(way.session("a")) for _ in range(3)]
    await asyncio.sleep(0)
    store.gate.set()
    sessions = await asyncio.gather(*waiting)
    assert sessions[0] is not None
    assert sessions[0] is sessions[1] is sessions[2]
    assert store.asked == 1


async def test_a_store_that_does_not_answer_costs_the_bound() -> None:
    store = Store()
    store.gate.clear()
    way = link(store, ManualClock(), Background(), timeout_s=0.01)
    assert await way.session("a") is None
    assert way.counters["store:open_failed"] == 1


async def test_tenants_have_namespaces_of_their_own() -> None:
    store = Store()
    store.shards = [shard()]
    way = link(store, ManualClock(), Background())
    a, b = await way.session("a"), await way.session("b")
    assert a is not None
    assert b is not None
    assert a.namespace != b.namespace
    assert await way.session("a") is a


async def test_leases_that_cannot_be_given_back_are_counted() -> None:
    background = Background()
    way = link(Store(), ManualClock(), background)
    way.release_for("a", [(ShardId("s0"), LeaseId(1))])
    assert await background.settle(WAIT_S)
    assert way.counters["store:leases_left_to_expire"] == 1


async def test_a_background_task_that_fails_is_counted_not_lost() -> None:
    background = Background()

    async def fail() -> None:
        raise Unavailable("no")

    task = background.spawn(fail(), "fails")
    with pytest.raises(Unavailable):
        await task
    assert await background.settle(WAIT_S)
    assert background.counters["background:failed"] == 1
    assert len(background) == 0
