"""Bounds of the bulk streams: bytes in flight, places, and peers that stop in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvstore.errors import ConfigError, DeadlineExceeded, OverLimit
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import Refusal, ShardId, TxnId
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.arena import ArenaTier
from kvstore.transport.base import CHUNK_NBYTES
from kvstore.transport.grpc import methods
from kvstore.transport.grpc.blocks_service import BlocksService
from kvstore.transport.grpc.bulk import WriteChunk, pack_read
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.v1 import blocks_pb2 as blocks
from tests.kvstore.conftest import Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain, epoch, new_driver, put, refs_of


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
    service = BlocksService(driver, inflight_nbytes_max=700, streams_max=1)
    with pytest.raises((OverLimit, ConfigError)):
        await service.write(_announcing(nbytes), _NoDeadline())
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
    monkeypatch.setattr("kvstore.transport.grpc.calls.TIMEOUT_S_MAX", 0.1)
    service = BlocksService(new_driver(), inflight_nbytes_max=2000, streams_max=1)

    async def half_a_frame() -> AsyncIterator[WriteChunk]:
        yield WriteChunk(1, 0, 1000, memoryview(bytes(500)))
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded, match=r"not done within 0\.1 s"):
        await service.write(half_a_frame(), _NoDeadline())
    assert (service._inflight_nbytes, service._streams) == (0, 0)


async def test_a_peer_that_stops_reading_holds_its_place_no_longer_than_its_deadline(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.transport.grpc.calls.TIMEOUT_S_MAX", 0.3)

    async def endless(*_: object) -> AsyncIterator[bytes]:
        while True:
            yield pack_read(0, CHUNK_NBYTES, memoryview(bytes(CHUNK_NBYTES)))

    monkeypatch.setattr(served.server._service.blocks, "_chunks", endless)
    await transport.hello(timeout_s=TIMEOUT)
    open_read: Any = transport._bulk.unary_stream(methods.READ.path, methods.READ.asked.SerializeToString)
    asked = blocks.ReadRequest(namespace_id=bytes(16))
    unread = open_read(asked, metadata=transport._metadata)  # no deadline, and nobody reads
    await unread.read()
    service = served.server._service.blocks
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


class _Deaf(_NoDeadline):
    """A peer that breaks off at the first message."""

    async def write(self, _: bytes) -> None:
        raise ConnectionResetError


async def test_what_was_lent_to_a_stream_is_given_back_before_its_place(served: Served) -> None:
    driver = served.driver
    assert isinstance(driver.storage, ArenaTier)
    namespace = await driver.open_namespace(SPEC, "", timeout_s=TIMEOUT)
    await driver.register_epoch(SPEC.model_id, epoch(1), timeout_s=TIMEOUT)
    (ref,) = refs_of(await put(driver, chain(namespace, 1), [0], epoch(1)))
    service = BlocksService(driver, inflight_nbytes_max=700, streams_max=1)
    asked = blocks.ReadRequest(
        incarnation=ref.incarnation, slots=[ref.slot], generations=[ref.generation], namespace_id=namespace
    )
    with pytest.raises(ConnectionResetError):
        await service.read(asked, _Deaf())
    assert not any(extent.borrowers for extent in driver.storage._extents.values())
