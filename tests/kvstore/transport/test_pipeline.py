"""Control calls over one stream: each with its own end, none harming another, all bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from kvstore.errors import DeadlineExceeded, OverLimit, Unavailable, WireVersionMismatch
from kvstore.nouns import Snapshot
from kvstore.transport.base import MatchResult, ShardStatus
from kvstore.transport.grpc import methods, pipeline_client
from kvstore.transport.grpc.begun import Begun
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.v1 import control_pb2 as control
from tests.kvstore.conftest import Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain, epoch, put
from tests.kvstore.transport.stalls import Stall, until

E1 = epoch(1)


def stream_of(transport: GrpcTransport) -> Any:
    return transport._pipeline._stream


@pytest.mark.parametrize("method", ["status", "match"], ids=["waits", "waits though it never should"])
async def test_a_call_that_waits_holds_up_no_other(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    snapshot = Snapshot(await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT), E1)
    stall = Stall(served, monkeypatch, method)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "status": lambda: transport.status(timeout_s=TIMEOUT),
        "match": lambda: transport.match(snapshot, [], "r", 1.0, timeout_s=TIMEOUT),
    }
    waiting = asyncio.ensure_future(calls[method]())
    await asyncio.wait_for(stall.reached.wait(), TIMEOUT)
    assert await transport.renew([], 1.0, timeout_s=TIMEOUT) == []
    assert not waiting.done()
    stall.go_on.set()
    assert isinstance(await waiting, ShardStatus | MatchResult)


async def test_a_cancelled_call_harms_no_other_and_keeps_the_stream(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(served, monkeypatch, "status")
    given_up, other = (asyncio.ensure_future(transport.status(timeout_s=TIMEOUT)) for _ in range(2))
    await asyncio.wait_for(stall.reached.wait(), TIMEOUT)
    before = stream_of(transport)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    stall.go_on.set()
    assert (await other).shard == "shard-0"
    assert stream_of(transport) is before


async def test_each_call_has_its_own_deadline(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(served, monkeypatch, "status")
    patient = asyncio.ensure_future(transport.status(timeout_s=TIMEOUT))
    with pytest.raises(DeadlineExceeded):
        await transport.status(timeout_s=0.1)
    stall.go_on.set()
    assert (await patient).shard == "shard-0"


async def test_the_deadline_reaches_the_shard(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    status = served.driver.status

    async def listen(*, timeout_s: float) -> ShardStatus:
        told.append(timeout_s)
        return await status(timeout_s=timeout_s)

    monkeypatch.setattr(served.driver, "status", listen)
    await transport.status(timeout_s=1.5)
    assert 0 < told[0] <= 1.5


async def test_a_broken_stream_fails_what_is_under_way_and_the_next_call_opens_another(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(served, monkeypatch, "status")
    under_way = [asyncio.ensure_future(transport.status(timeout_s=TIMEOUT)) for _ in range(3)]
    await asyncio.wait_for(stall.reached.wait(), TIMEOUT)
    broken = stream_of(transport)
    await served.restart()
    for call in under_way:
        with pytest.raises(Unavailable):
            await call
    async with asyncio.timeout(TIMEOUT):
        while True:  # refused, until gRPC connects again
            try:
                assert (await transport.status(timeout_s=TIMEOUT)).shard == "shard-0"
                break
            except Unavailable:
                await asyncio.sleep(0.05)
    assert stream_of(transport) is not broken


async def test_a_draining_shard_answers_what_it_took_and_ends_the_stream(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(served, monkeypatch, "status")
    under_way = asyncio.ensure_future(transport.status(timeout_s=TIMEOUT))
    await asyncio.wait_for(stall.reached.wait(), TIMEOUT)
    stopping = asyncio.ensure_future(served.server.stop(TIMEOUT))
    await until(lambda: served.server._service._draining)
    assert not under_way.done()
    stall.go_on.set()
    assert (await under_way).shard == "shard-0"
    await asyncio.wait_for(stopping, TIMEOUT)  # an idle stream does not keep it for the whole grace
    await until(lambda: stream_of(transport).error is not None)
    with pytest.raises(Unavailable):
        await transport.status(timeout_s=TIMEOUT)


async def test_more_calls_than_may_be_under_way_take_turns(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport._pipeline._turns = asyncio.Semaphore(2)
    stall = Stall(served, monkeypatch, "status")
    calls = [asyncio.ensure_future(transport.status(timeout_s=TIMEOUT)) for _ in range(5)]
    await asyncio.wait_for(stall.reached.wait(), TIMEOUT)
    with pytest.raises(DeadlineExceeded, match="under way all the while"):
        await transport.status(timeout_s=0.05)
    assert len(stream_of(transport)._waiting) == 2
    stall.go_on.set()
    assert {(await call).shard for call in calls} == {"shard-0"}


async def test_what_a_stalled_shard_was_not_sent_is_bounded(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_client, "OUTBOX_MAX", 3)
    await transport.status(timeout_s=TIMEOUT)
    never = asyncio.Event()

    async def stuck(_: bytes) -> None:
        await never.wait()

    monkeypatch.setattr(stream_of(transport)._call, "write", stuck, raising=False)
    for _ in range(4):  # the first is with the writer
        with pytest.raises(DeadlineExceeded):
            await transport.status(timeout_s=0.01)
    with pytest.raises(Unavailable, match="does not read"):
        await transport.status(timeout_s=TIMEOUT)


async def test_a_match_that_is_answered_too_late_leaves_no_pin_behind(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)
    await transport.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    made = chain(namespace, 1)
    await put(served.driver, made, [0], E1)
    stall = Stall(served, monkeypatch, "match")
    late = asyncio.ensure_future(
        transport.match(Snapshot(namespace, E1), made.keys, "r", 60.0, timeout_s=TIMEOUT)
    )
    await asyncio.wait_for(stall.reached.wait(), TIMEOUT)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    released = asyncio.Event()
    release = served.driver.release

    async def listen(*args: Any, **named: Any) -> None:
        await release(*args, **named)
        released.set()

    monkeypatch.setattr(served.driver, "release", listen)
    stall.go_on.set()
    await asyncio.wait_for(released.wait(), TIMEOUT)
    assert served.driver.core.leases == 0


async def test_a_burst_of_calls_shares_messages(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    await transport.status(timeout_s=TIMEOUT)
    call, sent = stream_of(transport)._call, list[int]()
    write = call.write

    async def count(message: bytes) -> None:
        sent.append(len(control.PipelineRequest.FromString(message).calls))
        await write(message)

    monkeypatch.setattr(call, "write", count, raising=False)
    answers = await asyncio.gather(*(transport.renew([], 1.0, timeout_s=TIMEOUT) for _ in range(100)))
    assert answers == [[]] * 100
    assert sum(sent) == 100
    assert len(sent) < 50


async def test_a_request_too_large_for_a_message_ends_nothing_but_itself(transport: GrpcTransport) -> None:
    snapshot = Snapshot(await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT), E1)
    before = stream_of(transport)
    keys = chain(snapshot.namespace, 1).keys * 300_000
    with pytest.raises(OverLimit, match="ask for less"):
        await transport.match(snapshot, keys, "r", 1.0, timeout_s=TIMEOUT)
    assert await transport.renew([], 1.0, timeout_s=TIMEOUT) == []
    assert stream_of(transport) is before


async def test_what_no_peer_of_ours_would_send(served: Served, transport: GrpcTransport) -> None:
    """An unknown call is told so; bytes that are no message end the stream, by name."""
    await transport.hello(timeout_s=TIMEOUT)
    with pytest.raises(WireVersionMismatch, match="'Teleport' is no call"):
        await transport._pipeline.call("Teleport", b"", TIMEOUT)
    for hello in ("Hello", "Watch", "Pipeline"):
        with pytest.raises(WireVersionMismatch):
            await transport._pipeline.call(hello, b"", TIMEOUT)
    many = control.PipelineRequest(calls=[control.PipelineCall(method="Renew")] * 257).SerializeToString()
    for message in (b"\xff\xff\xff", many):
        call: Any = transport._control.stream_stream(methods.PIPELINE.path)
        stream = call(metadata=transport._metadata, timeout=TIMEOUT)
        await stream.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stream.read()
        assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await transport.renew([], 1.0, timeout_s=TIMEOUT) == []


async def test_a_foreign_client_needs_no_pipeline(served: Served, transport: GrpcTransport) -> None:
    for method, asked in ((methods.RENEW, control.RenewRequest()), (methods.STATUS, control.StatusRequest())):
        call: Any = transport._control.unary_unary(method.path, **method.codec())
        assert isinstance(await call(asked, metadata=transport._metadata, timeout=TIMEOUT), method.answer)


async def test_a_begun_coroutine_goes_on_where_it_is_awaited() -> None:
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def at_once() -> bytes:
        return b"now"

    async def later() -> bytes:
        return await answered

    with pytest.raises(StopIteration) as now:
        Begun(at_once())
    assert now.value.value == b"now"
    waiting = asyncio.ensure_future(_awaited(Begun(later())))
    answered.set_result(b"then")
    assert await waiting == b"then"


async def test_a_begun_coroutine_can_be_cancelled() -> None:
    ended = asyncio.Event()

    async def forever() -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    waiting = asyncio.ensure_future(_awaited(Begun(forever())))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()


async def _awaited(begun: Begun[bytes]) -> bytes:
    return await begun
