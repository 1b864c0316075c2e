"""A shard that is full says when to come back, and a client does, within its deadline."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from kvstore.errors import OverLimit
from kvstore.transport.base import ShardStatus
from kvstore.transport.grpc import methods, pipeline_service
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.v1 import control_pb2 as control
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import TIMEOUT
from tests.kvstore.transport.stalls import Stall, until


async def test_calls_beyond_a_streams_bound_are_told_when_to_come_back(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_service, "WAITING_MAX", 2)
    monkeypatch.setattr("kvstore.transport.grpc.client.ATTEMPTS_MAX", 1)
    stall = Stall(served, monkeypatch, "status")
    taken = [asyncio.ensure_future(transport.status(timeout_s=TIMEOUT)) for _ in range(2)]
    await asyncio.wait_for(stall.reached.wait(), TIMEOUT)
    with pytest.raises(OverLimit) as refused:
        await transport.status(timeout_s=TIMEOUT)
    assert refused.value.retry_after_s == pipeline_service.RETRY_AFTER_S
    stall.go_on.set()
    assert {(await call).shard for call in taken} == {"shard-0"}


@pytest.mark.parametrize(
    ("refusals", "timeout_s", "retry_after_s", "asked"),
    [(2, TIMEOUT, 0.01, 3), (9, TIMEOUT, 0.01, 3), (9, 1.0, 30.0, 1), (9, TIMEOUT, None, 1)],
    ids=["in the end", "a few times only", "not past its deadline", "never where it is of no use"],
)
async def test_a_shard_that_pushes_back_is_asked_again(
    served: Served,
    transport: GrpcTransport,
    monkeypatch: pytest.MonkeyPatch,
    refusals: int,
    timeout_s: float,
    retry_after_s: float | None,
    asked: int,
) -> None:
    status, calls = served.driver.status, 0

    async def refuse(*, timeout_s: float) -> ShardStatus:
        nonlocal calls
        calls += 1
        if calls <= refusals:
            raise OverLimit("come back", retry_after_s=retry_after_s)
        return await status(timeout_s=timeout_s)

    monkeypatch.setattr(served.driver, "status", refuse)
    if refusals < asked:
        assert (await transport.status(timeout_s=timeout_s)).shard == "shard-0"
    else:
        with pytest.raises(OverLimit, match="come back"):
            await transport.status(timeout_s=timeout_s)
    assert calls == asked


async def test_push_back_travels_as_metadata_of_a_call_of_its_own(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*, timeout_s: float) -> ShardStatus:
        raise OverLimit("come back", retry_after_s=0.25)

    monkeypatch.setattr(served.driver, "status", refuse)
    call: Any = transport._control.unary_unary(methods.STATUS.path, **methods.STATUS.codec())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(control.StatusRequest(), metadata=transport._metadata, timeout=TIMEOUT)
    assert dict(refused.value.trailing_metadata() or ()) == {
        "kvstrata-error": "OverLimit",
        "grpc-retry-pushback-ms": "250",
    }


async def test_only_so_many_pipelines(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.transport.grpc.client.ATTEMPTS_MAX", 1)
    limits = served.server._service._limits
    object.__setattr__(limits, "pipelines_max", 1)
    first, second = (GrpcTransport(served.driver.shard, served.address, TOKEN) for _ in range(2))
    await first.status(timeout_s=TIMEOUT)
    with pytest.raises(OverLimit, match="pipelines are open"):
        await second.status(timeout_s=TIMEOUT)
    await first.close()
    await until(lambda: not served.server._service._pipelines)
    assert (await second.status(timeout_s=TIMEOUT)).shard == "shard-0"
    await second.close()
