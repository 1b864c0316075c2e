"""What is asked of all shards is answered by all, or by name of those that did not; a watch has no gaps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.errors import Compacted, ConfigError, EpochUnknown, Incomplete, Unauthenticated, Unavailable
from kvstore.merged_watch import Changed, Resync, Silent, Watch, WatchEvent
from kvstore.nouns import ChangeKind, Revision, ShardId
from kvstore.session import StoreSession
from kvstore.tiers.host import HostTier
from kvstore.topology import Topology
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import FRAME_NBYTES, SECRET, SPEC, chain, epoch
from tests.kvstore.test_client import LONG, publish

E1 = epoch(1)
WAIT_S = 10.0


def shard(name: str) -> ShardDriver:
    return ShardDriver(DriverConfig(ShardId(name), 256 * FRAME_NBYTES, SECRET), HostTier())


@pytest.fixture
async def drivers() -> list[ShardDriver]:
    return [shard(f"shard-{i}") for i in range(3)]


@pytest.fixture
async def local(drivers: list[ShardDriver]) -> AsyncIterator[StoreClient]:
    async with StoreClient.over(drivers) as client:
        yield client


@pytest.fixture
async def session(local: StoreClient) -> StoreSession:
    return await local.open(SPEC, E1)


async def until(watch: Watch, kind: type[WatchEvent]) -> WatchEvent:
    async with asyncio.timeout(WAIT_S):
        async for event in watch:
            if isinstance(event, kind):
                return event
    raise AssertionError(f"the watch ended without {kind.__name__}")


async def test_epochs_are_told_to_every_shard(local: StoreClient, session: StoreSession) -> None:
    await local.register_epoch(SPEC.model_id, epoch(2))
    assert sorted(await local.advance_epoch(SPEC.model_id, 2)) == ["shard-0", "shard-1", "shard-2"]
    assert {known.current for known in (await local.epochs(SPEC.model_id)).values()} == {2}


async def test_a_shard_that_did_not_do_it_is_named(
    local: StoreClient, session: StoreSession, drivers: list[ShardDriver]
) -> None:
    await drivers[1].close()
    with pytest.raises(Incomplete, match="not by shard-1") as raised:
        await local.advance_epoch(SPEC.model_id, 1)
    assert sorted(raised.value.done) == ["shard-0", "shard-2"]
    assert [type(error) for error in raised.value.failed.values()] == [Unavailable]
    with pytest.raises(Incomplete):
        await local.purge(session.namespace)
    listed = local.listing(session.namespace)
    with pytest.raises(Incomplete):
        assert {page.shard async for page in listed} == {"shard-0", "shard-2"}


async def test_where_all_fail_alike_that_is_the_error(local: StoreClient, session: StoreSession) -> None:
    with pytest.raises(EpochUnknown):
        await local.advance_epoch(SPEC.model_id, 9)


async def test_a_listing_has_what_all_shards_hold_and_a_purge_takes_it(
    local: StoreClient, session: StoreSession
) -> None:
    made = chain(session.namespace, LONG)
    await publish(session, made)
    pages = [page async for page in local.listing(session.namespace)]
    assert sorted(v.key for page in pages for v in page.versions) == sorted(made.keys)
    purged = await local.purge(session.namespace, keys=made.keys[:5])
    assert sum(done.versions for done in purged.values()) == 5
    at = {page.shard: page.revision for page in pages}
    await local.compact()
    with pytest.raises(Compacted):
        await anext(local.listing(session.namespace, at=at))
    assert {n.model_id for known in (await local.namespaces()).values() for n in known} == {SPEC.model_id}


async def test_a_watch_tells_of_every_commit_with_its_shard_and_resumes_without_a_gap(
    local: StoreClient, session: StoreSession
) -> None:
    made = chain(session.namespace, LONG)
    told: list[tuple[str, bytes]] = []
    async with local.watch([session.namespace], for_s=WAIT_S) as watch:
        for _ in range(3):
            assert (await until(watch, Changed)).changes == ()  # type: ignore[union-attr]
        await publish(session, made)
        event = await until(watch, Changed)
        assert isinstance(event, Changed)
        told += [(event.shard, change.key) for change in event.changes]
        seen = dict(watch.seen)
    async with local.watch([session.namespace], after=seen, for_s=WAIT_S) as resumed:
        while len(told) < LONG:
            event = await until(resumed, Changed)
            assert isinstance(event, Changed)
            assert all(change.kind is ChangeKind.COMMITTED for change in event.changes)
            told += [(event.shard, change.key) for change in event.changes]
    assert sorted(key for _, key in told) == sorted(made.keys)
    placed = {block.key: block.ref.shard for block in (await session.match(
        made.keys, owner="r", lease_s=1.0, timeout_s=WAIT_S
    )).blocks}  # fmt: skip
    assert {key: where for where, key in told} == placed


async def test_a_watch_whose_past_is_forgotten_is_told_to_list(
    local: StoreClient, session: StoreSession
) -> None:
    await publish(session, chain(session.namespace, LONG))
    status = max(await local.status(), key=lambda status: status.versions)
    old = {status.shard: Revision(status.incarnation, 0)}
    await local.compact()
    async with local.watch([session.namespace], after=old, for_s=WAIT_S) as watch:
        shards = {(await until(watch, Resync)).shard for _ in range(3)}
    assert shards == {"shard-0", "shard-1", "shard-2"}, "of two of them nothing was known at all"


async def test_a_shard_that_restarts_is_silent_and_then_to_be_listed(
    client: StoreClient, shards: list[Served]
) -> None:
    session = await client.open(SPEC, E1)
    async with client.watch([session.namespace], for_s=30) as watch:
        for _ in range(3):
            await until(watch, Changed)
        await shards[1].restart()
        silent = await until(watch, Silent)
        assert isinstance(silent, Silent)
        assert silent.shard == "shard-1"
        assert (await until(watch, Resync)).shard == "shard-1"
        await publish(session, chain(session.namespace, LONG))
        assert (await until(watch, Changed)).shard in {"shard-0", "shard-1", "shard-2"}


async def test_a_watch_ends_in_time(local: StoreClient, session: StoreSession) -> None:
    async with asyncio.timeout(WAIT_S), local.watch([session.namespace], for_s=0.05) as watch:
        assert len([event async for event in watch]) == 3


async def test_one_address_is_enough_to_find_all_shards(shards: list[Served], topology: Topology) -> None:
    for served in shards:
        served.server.set_topology(topology)
    async with StoreClient.connect_to([shards[2].address], token=TOKEN) as client:
        assert client.topology == topology
    await shards[0].stop()
    async with StoreClient.connect_to([shards[0].address, shards[1].address], token=TOKEN) as client:
        assert client.topology == topology


async def test_where_no_shard_knows_a_topology_the_addresses_are_it(shards: list[Served]) -> None:
    async with StoreClient.connect_to([s.address for s in shards[:2]], token=TOKEN) as client:
        assert [entry.shard for entry in client.topology.shards] == ["shard-0", "shard-1"]


async def test_admin_addresses_are_asked_who_they_are_and_may_change_things(shards: list[Served]) -> None:
    admins = [served.server.admin_address for served in shards]
    async with StoreClient.connect_to(admins, token=TOKEN, admin=True) as admin:
        await admin.register_epoch("m", E1)
        assert len(await admin.advance_epoch("m", 1)) == 3


async def test_nobody_there_and_a_wrong_token_say_so(shards: list[Served]) -> None:
    with pytest.raises(Unavailable, match="no store answers at"):
        await StoreClient.connect_to(["127.0.0.1:9"])
    with pytest.raises(Unauthenticated):
        await StoreClient.connect_to([shards[0].address], token="wrong")
    with pytest.raises(ConfigError, match="at least one"):
        await StoreClient.connect_to([])
