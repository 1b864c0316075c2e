"""Promise: what one message may make a shard do is bounded before anything is made of it."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.access import Tenant
from kvstore.errors import ConfigError, OverLimit
from kvstore.nouns import KEYS_MAX, LEASES_MAX, OFFERS_MAX, LeaseId, Quality, ShardId
from kvstore.transport.grpc import wire
from kvstore.transport.grpc.blocks_service import refs_in
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.v1 import blocks_pb2 as blocks
from kvstore.v1 import control_pb2 as control
from tests.kvstore.conftest import Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain, epoch, offer


def test_keys_offers_and_references_are_counted_first() -> None:
    with pytest.raises(OverLimit, match="keys in one call"):
        wire.split_keys(bytes(32 * (KEYS_MAX + 1)))
    with pytest.raises(OverLimit, match="offers in one call"):
        wire.offers_in(control.BeginRequest(nbytes=[1] * (OFFERS_MAX + 1)))
    with pytest.raises(OverLimit, match="references in one call"):
        refs_in(ShardId("s"), blocks.ReadRequest(slots=[1] * (KEYS_MAX + 1)))


async def test_leases_of_one_call_are_bounded(transport: GrpcTransport) -> None:
    many = [LeaseId(n) for n in range(1, LEASES_MAX + 2)]
    with pytest.raises(OverLimit, match="leases in one call"):
        await transport.renew(many, 1.0, timeout_s=TIMEOUT)
    with pytest.raises(OverLimit, match="leases in one call"):
        await transport.release(many, timeout_s=TIMEOUT)


async def test_a_transaction_that_nobody_waits_for_any_more_is_aborted(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller gave up between the question and the answer: the room comes back at once."""
    namespace = await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)
    await transport.register_epoch(SPEC.model_id, epoch(1), timeout_s=TIMEOUT)
    begin, begun, aborted = served.driver.begin, asyncio.Event(), asyncio.Event()
    abort = served.driver.abort

    async def slow(*asked: object, **more: object) -> object:
        opened = await begin(*asked, **more)  # type: ignore[arg-type]
        call.cancel()
        begun.set()
        return opened

    async def told(*asked: object, **more: object) -> None:
        await abort(*asked, **more)  # type: ignore[arg-type]
        aborted.set()

    monkeypatch.setattr(served.driver, "begin", slow)
    monkeypatch.setattr(served.driver, "abort", told)
    asked = [offer(chain(namespace, 1), 0)]
    call = asyncio.ensure_future(
        transport.begin(namespace, epoch(1), Quality.LOSSLESS, asked, "w", 30.0, bytes(16), timeout_s=TIMEOUT)
    )
    await asyncio.wait_for(begun.wait(), TIMEOUT)
    await asyncio.wait_for(aborted.wait(), TIMEOUT)
    assert served.driver.core.usage().staged_nbytes == 0
    assert served.driver.core.leases == 0
    with pytest.raises(asyncio.CancelledError):
        await call


def test_no_tenant_is_named_like_who_names_nobody() -> None:
    with pytest.raises(ConfigError, match="choose another name"):
        Tenant("default", token="a token")
