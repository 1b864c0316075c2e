"""The wire itself: errors by name, bounds, versions, health, and what a server refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

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
from kvstore.nouns import (
    BlockRef,
    Incarnation,
    MissReason,
    NamespaceId,
    Quality,
    Refusal,
    ShardId,
    Snapshot,
    TxnId,
)
from kvstore.server import ServerConfig, ShardServer, TlsFiles, is_loopback
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import CHUNK_NBYTES, ShardHello, ShardStatus
from kvstore.transport.grpc import methods, wire
from kvstore.transport.grpc.blocks_client import _chunks
from kvstore.transport.grpc.bulk import parse_write
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.transport.grpc.options import channel_options
from kvstore.v1 import control_pb2 as control
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain, epoch, frame, new_driver, offer

NAMESPACE = NamespaceId(bytes(16))

E1 = epoch(1)


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
    big = memoryview(bytes(range(256)) * 20_000)
    pieces = [parse_write(p) for p in _chunks(TxnId(1), [(0, b"h" * HEADER_NBYTES, big)])]
    assert len(pieces) == 3
    assert max(len(p.data) for p in pieces) == CHUNK_NBYTES
    assert b"".join(p.data for p in pieces) == b"h" * HEADER_NBYTES + big
    assert {p.frame_nbytes for p in pieces} == {HEADER_NBYTES + big.nbytes}


async def test_no_other_call_is_made_before_who_is_there_is_known(served: Served) -> None:
    impostor = GrpcTransport(ShardId("shard-9"), served.address, TOKEN)
    elsewhere = BlockRef(ShardId("shard-9"), Incarnation(1), 0, 1)
    for call in (
        impostor.status(timeout_s=TIMEOUT),
        impostor.write(TxnId(1), [], timeout_s=TIMEOUT),
        anext(impostor.read(NAMESPACE, [elsewhere], timeout_s=TIMEOUT)),
    ):
        with pytest.raises(Unavailable, match="refresh the topology"):
            await call
    await impostor.close()


async def test_who_is_there_is_asked_again_after_a_shard_was_gone(
    served: Served, transport: GrpcTransport
) -> None:
    """Another shard may stand behind the address by then: it must not be taken for ours."""
    await transport.status(timeout_s=TIMEOUT)
    await served.stop()
    with pytest.raises(Unavailable):
        await transport.status(timeout_s=TIMEOUT)
    other = await Served.start("shard-9", port=int(served.address.rpartition(":")[2]))
    said: set[str] = set()
    async with asyncio.timeout(TIMEOUT):
        while not any("is shard shard-9" in words for words in said):
            with pytest.raises(Unavailable) as raised:  # refused, until gRPC connects again
                await transport.status(timeout_s=TIMEOUT)
            said.add(str(raised.value))
            await asyncio.sleep(0.05)
    await other.stop()


def test_a_shard_that_is_back_is_tried_again_within_seconds() -> None:
    """gRPC's own bound between two attempts is two minutes."""
    options = dict(channel_options("control"))
    assert (options["grpc.initial_reconnect_backoff_ms"], options["grpc.max_reconnect_backoff_ms"]) == (
        200,
        2000,
    )


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


async def test_a_bound_of_grpcs_own_is_over_limit_and_not_a_dead_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = new_driver()
    at_once, answers = 3, asyncio.Event()

    async def stall(*, timeout_s: float) -> ShardHello:
        await answers.wait()
        return ShardHello(driver.shard, Incarnation(7), 1, 1)

    monkeypatch.setattr(driver, "hello", stall)
    server = ShardServer(driver, ServerConfig(concurrent_calls_max=1, pipelines_max=1, watches_max=1))
    transport = GrpcTransport(ShardId("shard-0"), await server.start())
    calls = [asyncio.ensure_future(transport.hello(timeout_s=TIMEOUT)) for _ in range(at_once + 4)]
    refused, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
    answers.set()
    assert {type(call.exception()) for call in refused} == {OverLimit}
    await asyncio.gather(*calls, return_exceptions=True)
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
    assert (len(found), found.lease, found.miss) == (0, None, MissReason.ABSENT)


async def test_a_miss_travels_in_the_stream(transport: GrpcTransport) -> None:
    hello = await transport.hello(timeout_s=TIMEOUT)
    refs = [BlockRef(hello.shard, hello.incarnation, slot, 0) for slot in (3, 4)]
    items = [item async for item in transport.read(NAMESPACE, refs, timeout_s=TIMEOUT)]
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
