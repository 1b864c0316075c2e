"""The client over real gRPC: a miss is legal, a wrong hit never is, and a sick shard is only a miss."""

from __future__ import annotations

import asyncio

import pytest

from kvstore import failpoints
from kvstore.answers import BlockMiss, Match, PublishBlock, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.errors import EpochConflict, Unauthenticated, Unavailable
from kvstore.frame import encode_header
from kvstore.hashing import STRIPE_BLOCKS, KeyChain
from kvstore.nouns import BlockMeta, BlockRef, Epoch, MissReason, PinnedBlock, Quality, Refusal, Tier
from kvstore.peers import ERRANDS_MAX
from kvstore.session import StoreSession
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import ReadItem
from tests.kvstore.conftest import Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain, epoch, payload

E1 = epoch(1)
LONG = 5 * STRIPE_BLOCKS  # blocks of a chain that touches several shards


@pytest.fixture
async def session(client: StoreClient) -> StoreSession:
    return await client.open(SPEC, E1)


def blocks_of(made: KeyChain, of: Epoch = E1) -> list[PublishBlock]:
    return [
        PublishBlock(key, made.parent(i), i, made.placement(i), memoryview(payload(key, of)))
        for i, key in enumerate(made.keys)
    ]


async def publish(session: StoreSession, made: KeyChain, pin_for_s: float | None = None) -> list[object]:
    done = await session.publish(
        blocks_of(made), quality=Quality.LOSSLESS, owner="w", pin_for_s=pin_for_s, timeout_s=TIMEOUT
    )
    await session.release(done.leases)
    return list(done.blocks)


async def match(session: StoreSession, made: KeyChain) -> Match:
    return await session.match(made.keys, owner="r", lease_s=10.0, timeout_s=TIMEOUT)


async def read(session: StoreSession, found: Match) -> list[bytes | MissReason]:
    """Payloads that verified, by the oracle too; reasons for the rest."""
    got: list[bytes | MissReason] = []
    async for item in session.read(found.blocks, timeout_s=TIMEOUT):
        assert item.index == len(got)
        got.append(item.reason if isinstance(item, BlockMiss) else bytes(item.payload))
        if isinstance(item, VerifiedBlock):
            assert got[-1] == payload(found.blocks[item.index].key, item.epoch)
    await session.release(found.leases)
    return got


async def test_what_is_published_is_matched_and_read_over_all_shards(
    session: StoreSession, client: StoreClient
) -> None:
    made = chain(session.namespace, LONG)
    assert all(isinstance(b, PinnedBlock) for b in await publish(session, made))
    found = await match(session, made)
    assert found.miss is None
    assert len({b.ref.shard for b in found.blocks}) > 1
    assert await read(session, found) == [payload(key, E1) for key in made.keys]
    assert client.counters["verified_blocks"] == LONG
    statuses = await client.status()
    assert [s.leases for s in statuses] == [0, 0, 0]
    assert [s.ownerless_nbytes for s in statuses] == [0, 0, 0]


async def test_a_second_publication_finds_what_exists(session: StoreSession, client: StoreClient) -> None:
    made = chain(session.namespace, LONG)
    first = await publish(session, made)
    written = client.counters["written_bytes"]
    assert await publish(session, made) == first
    assert client.counters["written_bytes"] == written


async def test_other_weights_and_other_tenants_see_nothing(
    client: StoreClient, session: StoreSession
) -> None:
    made = chain(session.namespace, 3)
    await publish(session, made)
    newer = await client.open(SPEC, epoch(2))
    assert (await match(newer, made)).miss is MissReason.OTHER_EPOCH
    stranger = await client.open(SPEC, E1, tenant="stranger")
    assert stranger.namespace != session.namespace
    assert (await match(stranger, chain(stranger.namespace, 3))).miss is MissReason.ABSENT
    with pytest.raises(EpochConflict):
        await client.open(SPEC, Epoch(1, epoch(2).weights_digest))


async def test_a_key_learned_from_another_tenant_reads_as_a_miss(
    client: StoreClient, session: StoreSession
) -> None:
    made = chain(session.namespace, 2)
    await publish(session, made)
    stranger = await client.open(SPEC, E1, tenant="stranger")
    found = await match(stranger, made)
    assert await read(stranger, found) in ([], [MissReason.OTHER_NAMESPACE] * 2)


async def test_a_flipped_byte_is_rejected_reported_and_written_again(
    session: StoreSession, client: StoreClient, shards: list[Served]
) -> None:
    made = chain(session.namespace, 4)
    await publish(session, made)
    found = await match(session, made)
    holder = next(s for s in shards if s.driver.shard == found.blocks[0].ref.shard)
    flipped = holder.driver.flip_stored_byte()
    got = await read(session, found)
    at = made.keys.index(flipped) if flipped else -1
    assert [i for i, item in enumerate(got) if item is MissReason.CHECKSUM] == [at]
    assert client.counters["rejected:checksum"] == 1
    await client._peers.finish_errands()
    assert len((await match(session, made)).blocks) == at
    await publish(session, made)
    assert await read(session, await match(session, made)) == [payload(key, E1) for key in made.keys]


async def test_a_dead_shard_costs_only_misses(session: StoreSession, shards: list[Served]) -> None:
    made = chain(session.namespace, LONG)
    await publish(session, made)
    found = await match(session, made)
    owners = [block.ref.shard for block in found.blocks]
    dead = next(shard for shard in owners if shard != owners[0])
    await next(s for s in shards if s.driver.shard == dead).stop()
    got = await read(session, found)
    for shard, item in zip(owners, got, strict=True):
        assert (item is MissReason.SHARD_UNAVAILABLE) == (shard == dead)
    again = await match(session, made)
    assert (len(again.blocks), again.miss) == (owners.index(dead), MissReason.SHARD_UNAVAILABLE)
    answers = await publish(session, chain(session.namespace, LONG, first_token=5000))
    assert Refusal.SHARD_UNAVAILABLE in answers
    assert any(isinstance(answer, PinnedBlock) for answer in answers)


async def test_a_restarted_shard_is_opened_again(session: StoreSession, shards: list[Served]) -> None:
    made = chain(session.namespace, LONG)
    await publish(session, made)
    found = await match(session, made)
    for shard in shards:
        await shard.restart()
    await asyncio.wait_for(_until_reachable(session, made), 20)
    assert set(await read(session, found)) == {MissReason.STALE_REFERENCE}
    assert all(isinstance(b, PinnedBlock) for b in await publish(session, made))
    assert await read(session, await match(session, made)) == [payload(key, E1) for key in made.keys]


async def _until_reachable(session: StoreSession, made: KeyChain) -> None:
    """gRPC waits before it connects again: ask until every shard answers that it has nothing."""
    while True:
        misses = {
            (await match(session, chain(session.namespace, 1, first))).miss for first in range(0, 60, 3)
        }
        if misses == {MissReason.ABSENT}:
            return
        await asyncio.sleep(0.1)


async def test_a_stream_that_breaks_is_a_miss_for_what_had_not_arrived(session: StoreSession) -> None:
    made = chain(session.namespace, 5)
    await publish(session, made)
    found = await match(session, made)
    with failpoints.armed("transport.read", failpoints.Fail(Unavailable("cut")), after=2):
        got = await read(session, found)
    assert got[:2] == [payload(key, E1) for key in made.keys[:2]]
    assert got[2:] == [MissReason.SHARD_UNAVAILABLE] * 3


@pytest.mark.parametrize("shared_memory", [False], ids=["grpc"])  # out of an arena nobody waits for the shard
async def test_a_shard_that_stalls_costs_a_bounded_wait(session: StoreSession) -> None:
    made = chain(session.namespace, 2)
    await publish(session, made)
    found = await match(session, made)
    with failpoints.armed("storage.read", failpoints.Delay(asyncio.Event())):
        got = [item async for item in session.read(found.blocks, timeout_s=0.2)]
    assert [item.reason for item in got if isinstance(item, BlockMiss)] == [MissReason.DEADLINE] * 2


async def _stall(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def test_a_shard_that_forgot_us_and_stalls_costs_the_caller_no_more_than_it_allowed(
    session: StoreSession, shards: list[Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in shards:
        await shard.restart()
    await asyncio.wait_for(_until_connected(session, shards), 20)
    for shard in shards:
        monkeypatch.setattr(shard.driver, "open_namespace", _stall)
    made = chain(session.namespace, 1)
    began = asyncio.get_running_loop().time()
    found = await session.match(made.keys, owner="r", lease_s=10.0, timeout_s=0.3)
    assert (found.blocks, found.miss) == ((), MissReason.DEADLINE)
    assert asyncio.get_running_loop().time() - began < 2.0


async def _until_connected(session: StoreSession, shards: list[Served]) -> None:
    for transport in session._peers.transports.values():
        while True:
            try:
                await transport.status(timeout_s=TIMEOUT)
                break
            except Unavailable:
                await asyncio.sleep(0.1)


async def test_a_shard_that_stalls_in_a_write_costs_the_writer_no_more_than_it_allowed(
    session: StoreSession, client: StoreClient, shards: list[Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in shards:
        monkeypatch.setattr(shard.driver, "write", _stall)
        monkeypatch.setattr(shard.driver, "abort", _stall)
    began = asyncio.get_running_loop().time()
    done = await session.publish(
        blocks_of(chain(session.namespace, 2)),
        quality=Quality.LOSSLESS,
        owner="w",
        pin_for_s=None,
        timeout_s=0.3,
    )
    assert done.blocks == (Refusal.DEADLINE, Refusal.DEADLINE)
    assert asyncio.get_running_loop().time() - began < 2.0
    await client._peers.finish_errands()
    assert client.counters["abort:failed"] == 1


async def test_errands_are_bounded(client: StoreClient) -> None:
    for _ in range(ERRANDS_MAX + 3):
        client._peers.send("release", asyncio.sleep(0.01))
    assert client.counters["release:dropped"] == 3
    await client._peers.finish_errands()
    client._peers.send("release", asyncio.sleep(0))
    assert client.counters["release:dropped"] == 3


async def test_a_block_in_a_codec_the_reader_has_no_decoder_for_is_a_miss(
    session: StoreSession, client: StoreClient, shards: list[Served]
) -> None:
    """Its payload may well have the length of a raw one: that does not make it raw."""
    made = chain(session.namespace, 1)
    body = payload(made.keys[0], E1)
    meta = BlockMeta(
        session.namespace,
        made.keys[0],
        made.parent(0),
        0,
        made.placement(0),
        E1,
        Quality.LOSSLESS,
        SPEC.layout.fingerprint,
    )
    held = memoryview(encode_header(meta, body, codec=7) + body)
    ref = BlockRef(shards[0].driver.shard, shards[0].driver.config.incarnation, 0, 1)
    block = PinnedBlock(made.keys[0], ref, E1, Quality.LOSSLESS, Tier.HOST)
    answer = await session._verified(0, block, ReadItem(0, held, None))
    assert isinstance(answer, BlockMiss)
    assert answer.reason is MissReason.BAD_HEADER


async def test_no_token_no_answer(topology: Topology) -> None:
    async with await StoreClient.connect(topology, token="another") as stranger:
        with pytest.raises(Unavailable, match="Unauthenticated"):
            await stranger.open(SPEC, E1)
        with pytest.raises(Unauthenticated):
            await next(iter(stranger._peers.transports.values())).status(timeout_s=TIMEOUT)


async def test_a_topology_change_moves_the_client(
    session: StoreSession, client: StoreClient, topology: Topology
) -> None:
    late = await Served.start("shard-late")
    try:
        grown = Topology(2, (*topology.shards, ShardEntry(late.driver.shard, late.address, 50.0)))
        await client.update_topology(grown)
        made = chain(session.namespace, LONG)
        assert all(isinstance(b, PinnedBlock) for b in await publish(session, made))
        assert (await late.driver.status(timeout_s=TIMEOUT)).versions > 0
        await client.update_topology(topology)  # older: ignored
        assert client.topology == grown
    finally:
        await late.stop()
