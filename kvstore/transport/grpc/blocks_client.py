"""The client's side of the bulk streams: frames in messages of about 2 MiB, on a connection of their own.

What fails raises gRPC's own errors; `GrpcTransport` names them. A stream that breaks raises, and what was
yielded before stands.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import xxhash

from kvstore.errors import Unavailable
from kvstore.frame import HEADER_NBYTES, PAYLOAD_NBYTES_MAX
from kvstore.nouns import BlockRef, MissReason, NamespaceId, Refusal, TxnId
from kvstore.transport.base import CHUNK_NBYTES, ReadItem
from kvstore.transport.grpc import bulk, methods, wire
from kvstore.transport.landing import Landing, copy, row_in
from kvstore.v1 import blocks_pb2 as blocks

Metadata = tuple[tuple[str, str], ...]


class BlocksClient:
    def __init__(self, channel: grpc.aio.Channel, metadata: Callable[[], Metadata]) -> None:
        self._channel = channel
        self._metadata = metadata

    async def read(
        self, namespace: NamespaceId, refs: Sequence[BlockRef], timeout_s: float
    ) -> AsyncIterator[ReadItem]:
        """Frames of references of one incarnation, in their order."""
        call: Any = self._channel.unary_stream(
            methods.READ.path, methods.READ.asked.SerializeToString, bulk.parse_read
        )
        stream = call(_asked(namespace, refs), timeout=timeout_s, metadata=self._metadata())
        try:
            async for item in _items(stream):
                yield item
        finally:
            stream.cancel()

    async def read_into(
        self,
        namespace: NamespaceId,
        refs: Sequence[BlockRef],
        landing: Landing,
        rows: Sequence[int],
        timeout_s: float,
    ) -> None:
        """As `LandingTransport.read_into`: each chunk is copied from its message to where it belongs."""
        call: Any = self._channel.unary_stream(
            methods.READ.path, methods.READ.asked.SerializeToString, bulk.parse_read
        )
        stream = call(_asked(namespace, refs), timeout=timeout_s, metadata=self._metadata())
        arriving: _Arriving | None = None
        try:
            async for chunk in stream:
                if chunk.run_nbytes and arriving is None:
                    for index, frame in _frames_of(chunk):
                        landing.land(row_in(rows, index), frame)
                    continue
                row = row_in(rows, chunk.index)
                if chunk.miss:
                    landing.void(row, MissReason(chunk.miss))
                    arriving = None
                    continue
                if arriving is None:
                    arriving = _Arriving(landing, row, chunk.frame_nbytes)
                if arriving.take(chunk.data):
                    arriving = None
        finally:
            stream.cancel()

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], timeout_s: float
    ) -> list[Refusal | None]:
        call: Any = self._channel.stream_unary(
            methods.WRITE.path, response_deserializer=methods.WRITE.answer.FromString
        )
        answer = await call(_chunks(txn, frames), timeout=timeout_s, metadata=self._metadata())
        outcomes = dict(zip(answer.indexes, wire.refusals_in(answer.refusals), strict=True))
        return [outcomes.get(index, Refusal.UNWRITTEN) for index, _, _ in frames]


def _asked(namespace: NamespaceId, refs: Sequence[BlockRef]) -> blocks.ReadRequest:
    return blocks.ReadRequest(
        incarnation=refs[0].incarnation,
        slots=[ref.slot for ref in refs],
        generations=[ref.generation for ref in refs],
        namespace_id=namespace,
        takes_runs=True,
    )


def _frames_of(chunk: bulk.ReadChunk) -> Iterator[tuple[int, memoryview]]:
    """Positions and frames of a run. Raises Unavailable for sizes that are not those of its frames."""
    if sum(chunk.run_nbytes) != chunk.data.nbytes or min(chunk.run_nbytes) <= HEADER_NBYTES:
        raise Unavailable("a run is not as long as its frames: the peer does not speak our framing")
    start = 0
    for index, nbytes in enumerate(chunk.run_nbytes, chunk.index):
        yield index, chunk.data[start : start + nbytes]
        start += nbytes


class _Arriving:
    """One frame on its way into a row: hashed where it lands, piece by piece, while it is in the cache."""

    def __init__(self, landing: Landing, row: int, frame_nbytes: int) -> None:
        """Raises Unavailable for a size no frame has."""
        if not HEADER_NBYTES < frame_nbytes <= PAYLOAD_NBYTES_MAX + HEADER_NBYTES:
            raise Unavailable(f"a frame of {frame_nbytes} bytes: the peer does not speak our framing")
        self._landing = landing
        self._row = row
        self._frame_nbytes = frame_nbytes
        self._filled = 0
        self._room = landing.room(row, frame_nbytes - HEADER_NBYTES)
        self._digest = xxhash.xxh3_64()

    def take(self, data: memoryview) -> bool:
        """Put the next bytes where they belong. True when the frame is whole."""
        start, end = self._filled, self._filled + data.nbytes
        if end > self._frame_nbytes or not data.nbytes:
            raise Unavailable("chunks run past their frame: the peer does not speak our framing")
        if start < HEADER_NBYTES:
            head = data[: HEADER_NBYTES - start]
            row = self._landing.headers[self._row]
            row[start : start + head.nbytes] = np.frombuffer(head, dtype=np.uint8)
            data, start = data[head.nbytes :], start + head.nbytes
        if self._room is not None and data.nbytes:
            at = start - HEADER_NBYTES
            target = self._room[at : at + data.nbytes]
            copy(target, data)
            self._digest.update(target)
        self._filled = end
        if end < self._frame_nbytes:
            return False
        self._landing.payload_nbytes[self._row] = end - HEADER_NBYTES
        self._landing.checksums[self._row] = self._digest.intdigest()
        return True


def runs_of_one_incarnation(refs: Sequence[BlockRef]) -> Iterator[tuple[int, Sequence[BlockRef]]]:
    """References in runs that one request can carry; almost always all of them."""
    start = 0
    for end in range(1, len(refs) + 1):
        if end == len(refs) or refs[end].incarnation != refs[start].incarnation:
            yield start, refs[start:end]
            start = end


async def _items(stream: Any) -> AsyncIterator[ReadItem]:
    """Whole frames from the chunks of a stream. Raises Unavailable when the peer breaks the framing."""
    frame, filled = bytearray(), 0
    async for chunk in stream:
        if chunk.miss:
            yield ReadItem(chunk.index, None, MissReason(chunk.miss))
            continue
        if chunk.run_nbytes and not filled:
            for index, whole in _frames_of(chunk):
                yield ReadItem(index, memoryview(bytearray(whole)), None)
            continue
        if not filled:
            if not 0 < chunk.frame_nbytes <= PAYLOAD_NBYTES_MAX + HEADER_NBYTES:
                raise Unavailable(
                    f"a frame of {chunk.frame_nbytes} bytes: the peer does not speak our framing"
                )
            frame = bytearray(chunk.frame_nbytes)
        end = filled + len(chunk.data)
        if end > len(frame) or not chunk.data:
            raise Unavailable("chunks run past their frame: the peer does not speak our framing")
        frame[filled:end] = chunk.data
        filled = end
        if filled == len(frame):
            yield ReadItem(chunk.index, memoryview(frame), None)
            filled = 0


def _chunks(txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]]) -> Iterator[bytes]:
    """The first chunk of a frame carries its header and the payload's start; none exceeds CHUNK_NBYTES."""
    for index, header, payload in frames:
        nbytes = len(header) + payload.nbytes
        first = CHUNK_NBYTES - len(header)
        yield bulk.pack_write(txn, index, nbytes, header, payload[:first])
        for start in range(first, payload.nbytes, CHUNK_NBYTES):
            yield bulk.pack_write(txn, index, nbytes, payload[start : start + CHUNK_NBYTES])
