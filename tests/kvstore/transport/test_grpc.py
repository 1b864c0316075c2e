"""The wire itself: errors by name, bounds, versions, health, and what a server refuses."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.errors import (
    ERRORS,
    ConfigError,
    DeadlineExceeded,
    KVStrataError,
    OverLimit,
    Unavailable,
    WireVersionMismatch,
)
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockRef, Incarnation, MissReason, Quality, Refusal, ShardId, Snapshot, TxnId
from kvstore.server import ServerConfig, ShardServer, TlsFiles, is_loopback
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import CHUNK_NBYTES, ReadItem, ShardHello, ShardStatus
from kvstore.transport.grpc import methods, wire
from kvstore.transport.grpc.bulk import WriteChunk, parse_write
from kvstore.transport.grpc.client import GrpcTransport, _chunks
from kvstore.transport.grpc.service import ShardService
from kvstore.v1 import blocks_pb2 as blocks
from kvstore.v1 import control_pb2 as control
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain, epoch, frame, new_driver, offer

E1 = epoch(1)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    shard = await Served.start("shard-0")
    yield shard
    await shard.stop()


@pytest.fixture
async def transport(served: Served) -> AsyncIterator[GrpcTransport]:
    made = GrpcTransport(ShardId("shard-0"), served.address, TOKEN)
    yield made
    await made.close()


async def test_hello_names_the_shard_and_its_incarnation(served: Served, transport: GrpcTransport) -> None:
    hello = await transport.hello(timeout_s=TIMEOUT)
    assert (hello.shard, hello.incarnation) == ("shard-0", served.driver.config.incarnation)
    impostor = GrpcTransport(ShardId("shard-9"), served.address, TOKEN)
    with pytest.raises(Unavailable, match="refresh the topology"):
        await impostor.hello(timeout_s=TIMEOUT)
    await impostor.close()


async def test_peers_without_a_common_wire_version_part(transport: GrpcTransport) -> None:
    with pytest.raises(WireVersionMismatch, match=r"\[2, 3\].*upgrade"):
        await transport._call(methods.HELLO, control.HelloRequest(wire_versions=[2, 3]), TIMEOUT)


@pytest.mark.parametrize("kind", ERRORS.values())
async def test_every_error_keeps_its_name_over_the_wire(
    served: Served, transport: GrpcTransport, kind: type[KVStrataError], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*, timeout_s: float) -> ShardStatus:
        raise kind("what happened")

    monkeypatch.setattr(served.driver, "status", fail)
    with pytest.raises(kind, match="what happened") as raised:
        await transport.status(timeout_s=TIMEOUT)
    assert type(raised.value) is kind
    assert kind.status in grpc.StatusCode.__members__


async def test_a_bug_of_ours_is_internal_and_says_no_more(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*, timeout_s: float) -> ShardStatus:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(served.driver, "status", fail)
    with pytest.raises(Unavailable, match="see its log") as raised:
        await transport.status(timeout_s=TIMEOUT)
    assert "secret" not in str(raised.value)


async def test_a_server_that_does_not_answer_costs_the_deadline(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stall(*, timeout_s: float) -> ShardStatus:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(served.driver, "status", stall)
    with pytest.raises(DeadlineExceeded):
        await transport.status(timeout_s=0.2)


async def test_nonsense_is_an_invalid_argument(transport: GrpcTransport) -> None:
    await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)
    bad = [
        (methods.MATCH, control.MatchRequest(namespace_id=b"short")),
        (methods.MATCH, control.MatchRequest(namespace_id=bytes(16))),
        (methods.OPEN_NAMESPACE, control.OpenNamespaceRequest(model_id="m")),
        (methods.BEGIN, control.BeginRequest(namespace_id=bytes(16), keys=b"odd")),
        (methods.REPORT, control.ReportRequest(slots=[1])),
    ]
    for method, asked in bad:
        with pytest.raises(ConfigError):
            await transport._call(method, asked, TIMEOUT)  # type: ignore[arg-type]


async def test_frames_larger_than_a_chunk_arrive_whole(served: Served, transport: GrpcTransport) -> None:
    big = memoryview(bytes(range(256)) * 10_000)
    pieces = [parse_write(p) for p in _chunks(TxnId(1), [(0, b"h" * HEADER_NBYTES, big)])]
    assert len(pieces) == 3
    assert max(len(p.data) for p in pieces) == CHUNK_NBYTES
    assert b"".join(p.data for p in pieces) == b"h" * HEADER_NBYTES + big
    assert {p.frame_nbytes for p in pieces} == {HEADER_NBYTES + big.nbytes}


async def test_writes_beyond_the_budget_in_flight_are_refused() -> None:
    server = ShardServer(new_driver(), ServerConfig(inflight_nbytes_max=1000))
    transport = GrpcTransport(ShardId("shard-0"), await server.start())
    too_big = (0, b"h" * HEADER_NBYTES, memoryview(bytes(800)))
    with pytest.raises(OverLimit, match="in flight"):
        await transport.write(TxnId(1), [too_big], timeout_s=TIMEOUT)
    await transport.close()
    await server.stop(0)


@pytest.mark.parametrize("nbytes", [[400, 400, 900], [400, 0], [900]])
async def test_the_write_budget_comes_back_whole_however_a_stream_ends(
    nbytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def take(*_: object, timeout_s: float) -> list[Refusal | None]:
        return [None]

    driver = new_driver()
    monkeypatch.setattr(driver, "write", take)
    service = ShardService(driver, inflight_nbytes_max=700, streams_max=1)
    with pytest.raises((OverLimit, ConfigError)):
        await service._write(_announcing(nbytes), _NoDeadline())
    assert service._inflight_nbytes == 0


async def _announcing(nbytes: list[int]) -> AsyncIterator[WriteChunk]:
    for index, frame_nbytes in enumerate(nbytes):
        yield WriteChunk(1, index, frame_nbytes, memoryview(bytes(frame_nbytes or 1)))


class _NoDeadline:
    def time_remaining(self) -> None:
        return None


async def test_a_peer_that_stops_sending_holds_its_bytes_no_longer_than_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.transport.grpc.service.TIMEOUT_S_MAX", 0.1)
    service = ShardService(new_driver(), inflight_nbytes_max=2000, streams_max=1)

    async def half_a_frame() -> AsyncIterator[WriteChunk]:
        yield WriteChunk(1, 0, 1000, memoryview(bytes(500)))
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded, match=r"not done within 0\.1 s"):
        await service._write(half_a_frame(), _NoDeadline())
    assert (service._inflight_nbytes, service._streams) == (0, 0)


async def test_a_peer_that_stops_reading_holds_its_place_no_longer_than_its_deadline(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.transport.grpc.service.TIMEOUT_S_MAX", 0.3)

    async def endless(*_: object, timeout_s: float) -> AsyncIterator[ReadItem]:
        for index in itertools.count():
            yield ReadItem(index, memoryview(bytes(CHUNK_NBYTES)), None)

    monkeypatch.setattr(served.driver, "read", endless)
    await transport.hello(timeout_s=TIMEOUT)
    open_read: Any = transport._bulk.unary_stream(methods.READ.path, methods.READ.asked.SerializeToString)
    unread = open_read(blocks.ReadRequest(), metadata=transport._metadata)  # no deadline, and nobody reads
    await unread.read()
    service = served.server._service
    assert service._streams == 1
    async with asyncio.timeout(TIMEOUT):
        while service._streams:  # noqa: ASYNC110 - a peer that reads nothing is told nothing
            await asyncio.sleep(0.01)
    monkeypatch.undo()
    assert (await transport.status(timeout_s=TIMEOUT)).shard == "shard-0"
    unread.cancel()


async def test_streams_leave_room_for_calls_without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ShardServer(new_driver(), ServerConfig(concurrent_calls_max=4))
    transport = GrpcTransport(ShardId("shard-0"), await server.start())
    opened = [asyncio.Event(), asyncio.Event()]
    waiting = iter(opened)

    async def stall(*_: object, timeout_s: float) -> list[Refusal | None]:
        next(waiting).set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(server._service._shard, "write", stall)
    frames = [(0, b"h" * HEADER_NBYTES, memoryview(bytes(800)))]
    writing = [asyncio.ensure_future(transport.write(TxnId(1), frames, timeout_s=TIMEOUT)) for _ in opened]
    for event in opened:
        await asyncio.wait_for(event.wait(), TIMEOUT)
    with pytest.raises(OverLimit, match="2 streams are open"):
        await transport.write(TxnId(1), frames, timeout_s=TIMEOUT)
    assert (await transport.status(timeout_s=TIMEOUT)).shard == "shard-0"
    for call in writing:
        call.cancel()
    await asyncio.gather(*writing, return_exceptions=True)
    await transport.close()
    await server.stop(0)


async def test_no_other_call_is_made_before_who_is_there_is_known(served: Served) -> None:
    impostor = GrpcTransport(ShardId("shard-9"), served.address, TOKEN)
    for call in (
        impostor.status(timeout_s=TIMEOUT),
        impostor.write(TxnId(1), [], timeout_s=TIMEOUT),
        anext(impostor.read([BlockRef(ShardId("shard-9"), Incarnation(1), 0, 1)], timeout_s=TIMEOUT)),
    ):
        with pytest.raises(Unavailable, match="refresh the topology"):
            await call
    await impostor.close()


async def test_a_channel_closed_under_a_call_is_an_unavailable_shard(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topology change closes what it replaces; who is on the line must not take that for a cancellation."""

    async def stall(*, timeout_s: float) -> ShardStatus:
        await asyncio.Event().wait()
        raise AssertionError

    await transport.hello(timeout_s=TIMEOUT)
    monkeypatch.setattr(served.driver, "status", stall)
    under_way = asyncio.ensure_future(transport.status(timeout_s=TIMEOUT))
    await asyncio.sleep(0.05)
    await transport.close()
    with pytest.raises(Unavailable, match="was closed"):
        await under_way
    with pytest.raises(Unavailable, match="was closed"):
        await transport.status(timeout_s=TIMEOUT)


async def test_a_cancelled_caller_stays_cancelled(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stall(*, timeout_s: float) -> ShardStatus:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(served.driver, "status", stall)
    under_way = asyncio.ensure_future(transport.status(timeout_s=TIMEOUT))
    await asyncio.sleep(0.05)
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await under_way


async def test_a_word_that_a_newer_peer_says_is_no_crash(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "match_result_out", lambda _: control.MatchResponse(miss="of_the_future"))
    namespace = await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)
    with pytest.raises(Unavailable, match=r"do not understand.*of_the_future"):
        await transport.match(Snapshot(namespace, E1), [], "r", 1.0, timeout_s=TIMEOUT)


@pytest.mark.parametrize("lease_s", [-1.0, 1e12, float("inf"), float("nan")])
async def test_any_lease_fits_the_wire(transport: GrpcTransport, lease_s: float) -> None:
    assert await transport.renew([], lease_s, timeout_s=TIMEOUT) == []


async def test_a_bound_of_grpcs_own_is_over_limit_and_not_a_dead_shard() -> None:
    server = ShardServer(new_driver(), ServerConfig(concurrent_calls_max=1))
    transport = GrpcTransport(ShardId("shard-0"), await server.start())
    answers = await asyncio.gather(
        *(transport.hello(timeout_s=TIMEOUT) for _ in range(50)), return_exceptions=True
    )
    assert {type(a) for a in answers} <= {ShardHello, OverLimit}
    assert OverLimit in {type(a) for a in answers}
    await transport.close()
    await server.stop(0)


async def test_an_owners_name_is_bounded(transport: GrpcTransport) -> None:
    snapshot = Snapshot(await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT), E1)
    await transport.match(snapshot, [], "o" * 256, 1.0, timeout_s=TIMEOUT)
    with pytest.raises(ConfigError, match="owner's name of 257"):
        await transport.match(snapshot, [], "o" * 257, 1.0, timeout_s=TIMEOUT)


async def test_a_begin_without_a_request_id_of_its_own_is_refused(transport: GrpcTransport) -> None:
    namespace = await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)
    with pytest.raises(ConfigError, match="request_id"):
        await transport.begin(namespace, E1, Quality.LOSSLESS, [], "w", 5.0, b"", timeout_s=TIMEOUT)


async def test_a_torn_write_is_refused_and_leaves_nothing(served: Served, transport: GrpcTransport) -> None:
    namespace = await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)
    await transport.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    made = chain(namespace, 1)
    begun = await transport.begin(
        namespace, E1, Quality.LOSSLESS, [offer(made, 0)], "w", 5.0, bytes(16), timeout_s=TIMEOUT
    )
    header, body = frame(made, 0, E1)
    torn = memoryview(b"\xff" + bytes(body[1:]))
    assert await transport.write(begun.txn, [(0, header, torn)], timeout_s=TIMEOUT) == [Refusal.CHECKSUM]
    assert (await transport.commit(begun.txn, 1.0, timeout_s=TIMEOUT)).blocks == (Refusal.CHECKSUM,)
    found = await transport.match(Snapshot(namespace, E1), made.keys, "r", 1.0, timeout_s=TIMEOUT)
    assert (found.hits, found.lease, found.miss) == ((), None, MissReason.ABSENT)


async def test_a_miss_travels_in_the_stream(transport: GrpcTransport) -> None:
    hello = await transport.hello(timeout_s=TIMEOUT)
    refs = [BlockRef(hello.shard, hello.incarnation, slot, 0) for slot in (3, 4)]
    items = [item async for item in transport.read(refs, timeout_s=TIMEOUT)]
    assert [(i.index, i.frame, i.miss) for i in items] == [
        (0, None, MissReason.STALE_REFERENCE),
        (1, None, MissReason.STALE_REFERENCE),
    ]


async def test_any_shard_tells_the_newest_topology(served: Served, transport: GrpcTransport) -> None:
    entry = ShardEntry(ShardId("shard-0"), served.address, 2.0)
    for version in (2, 1):
        served.server.set_topology(Topology(version, (entry,)))
    assert await transport.topology(timeout_s=TIMEOUT) == Topology(2, (entry,))


async def test_health_is_told_without_a_token(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", methods.CONTROL, methods.BLOCKS):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_taken_port_is_an_error_not_a_share(served: Served) -> None:
    port = int(served.address.rpartition(":")[2])
    server = ShardServer(new_driver(), ServerConfig(port=port))
    with pytest.raises(ConfigError, match="choose another port"):
        await server.start()


async def test_tls_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    tls = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")
    with pytest.raises(ConfigError, match=r"key\.pem cannot be read: No such file"):
        await ShardServer(new_driver(), ServerConfig(tls=tls)).start()


def test_only_loopback_without_tls_or_a_word() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "db.example")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(ConfigError, match="configure TLS"):
        ServerConfig(host="0.0.0.0")


async def test_status_survives_the_wire(served: Served, transport: GrpcTransport) -> None:
    own = await served.driver.status(timeout_s=TIMEOUT)
    assert wire.status_in(wire.status_out(own)) == own
    assert (await transport.status(timeout_s=TIMEOUT)).capacity_nbytes == own.capacity_nbytes
