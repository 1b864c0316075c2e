"""Small frames share a message where the reader takes runs: no other answers, in no other order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from kvstore import failpoints
from kvstore.errors import Unavailable
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockRef, MissReason, NamespaceId
from kvstore.transport.grpc import blocks_client, blocks_service, methods
from kvstore.transport.grpc.bulk import ReadChunk, pack_run, parse_read
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.transport.landing import Landing
from kvstore.v1 import blocks_pb2 as blocks
from tests.kvstore.conftest import Served
from tests.kvstore.oracle import FRAME_NBYTES, LAYOUT, SPEC, TIMEOUT, chain, epoch, payload, put, refs_of

E1 = epoch(1)
BLOCKS = 7
RUN_FRAMES = 3  # that fit into a message of these tests


class Stored:
    """Seven blocks, of which the fourth reference is past."""

    namespace: NamespaceId
    refs: list[BlockRef]
    payloads: list[bytes]


@pytest.fixture
async def stored(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stored]:
    monkeypatch.setattr(blocks_service, "CHUNK_NBYTES", RUN_FRAMES * FRAME_NBYTES)
    made = Stored()
    made.namespace = await transport.open_namespace(SPEC, "", timeout_s=TIMEOUT)
    await transport.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    keys = chain(made.namespace, BLOCKS)
    made.refs = refs_of(await put(served.driver, keys, range(BLOCKS), E1))
    made.refs[3] = made.refs[3]._replace(generation=made.refs[3].generation + 1)
    made.payloads = [payload(key, E1) for key in keys.keys]
    yield made
    assert not any(extent.borrowers for extent in served.driver.storage._extents.values())  # type: ignore[attr-defined]


async def messages(transport: GrpcTransport, stored: Stored, takes_runs: bool) -> list[blocks.ReadResponse]:
    """As a foreign client sees them."""
    await transport.hello(timeout_s=TIMEOUT)
    asked = blocks_client._asked(stored.namespace, stored.refs)
    asked.takes_runs = takes_runs
    call: Any = transport._bulk.unary_stream(methods.READ.path, methods.READ.asked.SerializeToString)
    stream = call(asked, timeout=TIMEOUT, metadata=transport._metadata)
    return [blocks.ReadResponse.FromString(message) async for message in stream]


async def test_a_run_is_frames_end_to_end_and_a_miss_stands_alone(
    transport: GrpcTransport, stored: Stored
) -> None:
    got = await messages(transport, stored, takes_runs=True)
    assert [(m.index, len(m.run_nbytes), m.miss) for m in got] == [
        (0, 3, ""),
        (3, 0, "stale_reference"),
        (4, 3, ""),
    ]
    assert list(got[2].run_nbytes) == [FRAME_NBYTES] * 3
    third = bytes(got[2].data[2 * FRAME_NBYTES :])
    assert third[HEADER_NBYTES:] == stored.payloads[6]


async def test_who_does_not_ask_for_runs_gets_none(transport: GrpcTransport, stored: Stored) -> None:
    got = await messages(transport, stored, takes_runs=False)
    assert [(m.index, m.frame_nbytes, bytes(m.data[HEADER_NBYTES:]) or m.miss) for m in got] == [
        (i, 0, "stale_reference") if i == 3 else (i, FRAME_NBYTES, stored.payloads[i]) for i in range(BLOCKS)
    ]


@pytest.mark.parametrize("room", [RUN_FRAMES, 1, 0.5], ids=["runs", "a frame each", "halves"])
async def test_every_answer_comes_once_in_order_in_whatever_messages(
    transport: GrpcTransport, stored: Stored, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_service, "CHUNK_NBYTES", int(room * FRAME_NBYTES))
    items = [i async for i in transport.read(stored.namespace, stored.refs, timeout_s=TIMEOUT)]
    assert [item.index for item in items] == list(range(BLOCKS))
    bodies = [item.miss if item.frame is None else bytes(item.frame[HEADER_NBYTES:]) for item in items]
    assert bodies == [*stored.payloads[:3], MissReason.STALE_REFERENCE, *stored.payloads[4:]]
    buffers = [bytearray(LAYOUT.block_nbytes) for _ in range(BLOCKS)]
    landing = Landing([memoryview(buffer) for buffer in buffers])
    rows = list(reversed(range(BLOCKS)))
    await transport.read_into(stored.namespace, stored.refs, landing, rows, timeout_s=TIMEOUT)
    landed = [bytes(buffers[row]) for row in rows]
    assert landed[:3] + landed[4:] == stored.payloads[:3] + stored.payloads[4:]
    assert landing.misses[rows[3]] is MissReason.STALE_REFERENCE


async def test_an_error_of_storage_in_a_run_costs_one_block(transport: GrpcTransport, stored: Stored) -> None:
    with failpoints.armed("storage.read", failpoints.Fail(OSError("EIO")), after=1):
        items = [i async for i in transport.read(stored.namespace, stored.refs, timeout_s=TIMEOUT)]
    assert [item.index for item in items if item.frame is None] == [1, 3]
    assert items[1].miss is MissReason.SHARD_UNAVAILABLE


def _run(frames: Iterable[int], data_nbytes: int) -> ReadChunk:
    return ReadChunk(0, 0, memoryview(bytes(data_nbytes)), "", tuple(frames))


@pytest.mark.parametrize(
    "chunk", [_run([300, 300], 599), _run([300, 300], 601), _run([HEADER_NBYTES, 344], 600)]
)
async def test_a_run_that_is_not_as_long_as_its_frames_is_not_believed(chunk: ReadChunk) -> None:
    with pytest.raises(Unavailable, match="does not speak our framing"):
        list(blocks_client._frames_of(chunk))


def test_a_run_is_the_protos_own_message() -> None:
    frames = [memoryview(bytes([i]) * nbytes) for i, nbytes in enumerate((300, 1, 70_000))]
    message = blocks.ReadResponse.FromString(pack_run(9, frames))
    assert (message.index, list(message.run_nbytes)) == (9, [300, 1, 70_000])
    assert message.data == b"".join(frames)
    parsed = parse_read(message.SerializeToString())
    assert (parsed.run_nbytes, bytes(parsed.data)) == ((300, 1, 70_000), message.data)
