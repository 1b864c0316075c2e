"""What a session gives back, splits and survives, whatever its shards do meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore.answers import BlockMiss, PublishBlock
from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.hashing import STRIPE_BLOCKS, KeyChain
from kvstore.matching import place
from kvstore.nouns import OFFERS_MAX, MissReason, PinnedBlock, Quality, Refusal, ShardId
from kvstore.session import StoreSession
from kvstore.tiers.host import HostTier
from kvstore.topology import ShardEntry, Topology
from tests.kvstore.conftest import Served
from tests.kvstore.oracle import FRAME_NBYTES, SECRET, SPEC, TIMEOUT, chain, epoch, payload

E1 = epoch(1)
LONG = 5 * STRIPE_BLOCKS  # blocks of a chain that touches several shards


async def publish(session: StoreSession, made: KeyChain, pin_for_s: float | None = None) -> list[object]:
    blocks = [
        PublishBlock(key, made.parent(i), i, made.placement(i), memoryview(payload(key, E1)))
        for i, key in enumerate(made.keys)
    ]
    done = await session.publish(
        blocks, quality=Quality.LOSSLESS, owner="w", pin_for_s=pin_for_s, timeout_s=TIMEOUT
    )
    await session.release(done.leases)
    return list(done.blocks)


def local_shard(name: str, frames: int = 256) -> ShardDriver:
    return ShardDriver(DriverConfig(ShardId(name), frames * FRAME_NBYTES, SECRET), HostTier())


@pytest.fixture
async def local() -> AsyncIterator[tuple[StoreClient, list[ShardDriver]]]:
    drivers = [local_shard(f"shard-{i}") for i in range(3)]
    async with StoreClient.over(drivers) as client:
        yield client, drivers
        for driver in drivers:
            driver.check_integrity()


Local = tuple[StoreClient, list[ShardDriver]]


class Gate:
    """Holds up the calls of one method, and says when the first has come."""

    def __init__(self, patch: pytest.MonkeyPatch, driver: ShardDriver, method: str) -> None:
        self.reached = asyncio.Event()
        patch.setattr(driver, method, self._stall)

    async def _stall(self, *_: object, **__: object) -> None:
        self.reached.set()
        await asyncio.Event().wait()


def busy(session: StoreSession, made: KeyChain, drivers: list[ShardDriver]) -> list[ShardDriver]:
    """The shards that own blocks of the chain."""
    placed = place([made.placement(i) for i in range(len(made.keys))], session._peers.weights)
    found = [driver for driver in drivers if driver.shard in placed]
    assert len(found) > 1
    return found


@pytest.mark.parametrize("what", ["match", "publish"])
async def test_a_cancelled_caller_leaves_no_lease_behind(
    local: Local, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, drivers = local
    session = await client.open(SPEC, E1)
    made = chain(session.namespace, LONG)
    if what == "match":
        await publish(session, made)
    gate = Gate(monkeypatch, busy(session, made, drivers)[-1], "match" if what == "match" else "begin")
    call = (
        session.match(made.keys, owner="r", lease_s=60.0, timeout_s=TIMEOUT)
        if what == "match"
        else publish(session, made, pin_for_s=60.0)
    )
    waiting = asyncio.ensure_future(call)
    await gate.reached.wait()
    for _ in range(20):  # the other shards answer meanwhile
        await asyncio.sleep(0)
    assert sum(driver.core.leases for driver in drivers) > 0
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await client._peers.finish_errands()
    assert [driver.core.leases for driver in drivers] == [0, 0, 0]


async def test_an_error_nobody_foresaw_costs_only_the_shard_it_came_from(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, drivers = local
    session = await client.open(SPEC, E1)
    made = chain(session.namespace, LONG)
    await publish(session, made)
    found = await session.match(made.keys, owner="r", lease_s=60.0, timeout_s=TIMEOUT)
    broken = busy(session, made, drivers)[-1]

    async def fail(*_: object, **__: object) -> None:
        raise ValueError("of the future")

    def break_off(*_: object, **__: object) -> None:
        raise ValueError("of the future")

    for method in ("match", "begin"):
        monkeypatch.setattr(broken, method, fail)
    monkeypatch.setattr(broken, "read", break_off)
    read = [item async for item in session.read(found.blocks, timeout_s=TIMEOUT)]
    missed = {item.index for item in read if isinstance(item, BlockMiss)}
    assert missed == {i for i, b in enumerate(found.blocks) if b.ref.shard == broken.shard}
    again = await session.match(made.keys, owner="r", lease_s=60.0, timeout_s=TIMEOUT)
    assert again.miss is MissReason.SHARD_UNAVAILABLE
    answers = await publish(session, chain(session.namespace, LONG, first_token=5000))
    assert Refusal.SHARD_UNAVAILABLE in answers
    assert any(isinstance(answer, PinnedBlock) for answer in answers)
    assert client.counters["unexpected_errors"] == 3


async def test_a_failed_assertion_is_heard(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process with the shard, as in a simulation: taken for a dead shard it would go unseen."""
    client, drivers = local
    session = await client.open(SPEC, E1)
    made = chain(session.namespace, LONG)

    async def fail(*_: object, **__: object) -> None:
        raise AssertionError("a bug of ours")

    monkeypatch.setattr(busy(session, made, drivers)[-1], "begin", fail)
    with pytest.raises(AssertionError, match="a bug of ours"):
        await publish(session, made, pin_for_s=60.0)
    await client._peers.finish_errands()
    assert [driver.core.leases for driver in drivers] == [0, 0, 0]


async def test_a_publication_longer_than_a_transaction_is_split() -> None:
    driver = local_shard("shard-0", frames=OFFERS_MAX + 1)
    async with StoreClient.over([driver]) as client:
        session = await client.open(SPEC, E1)
        answers = await publish(session, chain(session.namespace, OFFERS_MAX + 1), pin_for_s=10.0)
        assert all(isinstance(answer, PinnedBlock) for answer in answers)
        assert driver.core.leases == 0
    driver.check_integrity()


async def test_only_what_a_shard_stored_counts_as_written(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = local
    session = await client.open(SPEC, E1)
    made = chain(session.namespace, 2)
    monkeypatch.setattr("kvstore.publication.encode_header", lambda *_: bytes(128))
    assert not any(isinstance(answer, PinnedBlock) for answer in await publish(session, made))
    assert client.counters["written_bytes"] == 0


async def test_a_topology_change_under_calls_costs_only_the_shard_that_left(
    shards: list[Served], topology: Topology, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await client.open(SPEC, E1)
    made = chain(session.namespace, LONG)
    await publish(session, made)
    pinned = await session.match(made.keys, owner="r", lease_s=60.0, timeout_s=TIMEOUT)
    await session.release(pinned.leases)
    drivers = [shard.driver for shard in shards]
    left = busy(session, made, drivers)[-1]
    gates = [Gate(monkeypatch, left, method) for method in ("match", "begin")]
    matching = asyncio.ensure_future(session.match(made.keys, owner="r", lease_s=60.0, timeout_s=TIMEOUT))
    publishing = asyncio.ensure_future(publish(session, chain(session.namespace, LONG, first_token=5000)))
    for gate in gates:
        await asyncio.wait_for(gate.reached.wait(), TIMEOUT)
    rest = tuple(entry for entry in topology.shards if entry.shard != left.shard)
    moved = ShardEntry(left.shard, "127.0.0.1:1")
    await client.update_topology(Topology(2, (*rest, moved)))
    found = await matching
    assert found.miss is MissReason.SHARD_UNAVAILABLE
    await session.release(found.leases)
    answers = await publishing
    assert Refusal.SHARD_UNAVAILABLE in answers
    await client._peers.finish_errands()
    assert [driver.core.leases for driver in drivers if driver is not left] == [0, 0]


async def test_closing_closes_every_connection_whatever_an_errand_ends_in(client: StoreClient) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    client._peers.send("release", cancelled())
    await client.close()
    assert all(t._closed for t in client._peers.transports.values())  # type: ignore[attr-defined]
