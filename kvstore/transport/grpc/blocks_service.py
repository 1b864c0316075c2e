"""The server's side of the bulk streams: frames out, frames in.

Bytes of writes in flight are admitted against a budget, and streams against a number: beyond them the
shard says RESOURCE_EXHAUSTED rather than queueing. A stream ends at its deadline whatever its peer does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from kvstore.closing import closing
from kvstore.driver import ShardDriver
from kvstore.errors import ConfigError, DeadlineExceeded, OverLimit
from kvstore.frame import HEADER_NBYTES
from kvstore.lending import Lent
from kvstore.nouns import KEYS_MAX, BlockRef, Incarnation, MissReason, ShardId, TxnId
from kvstore.transport.base import CHUNK_NBYTES, ShardTransport
from kvstore.transport.grpc import bulk, wire
from kvstore.transport.grpc.calls import Context, left
from kvstore.v1 import blocks_pb2 as blocks
from kvstore.v1 import control_pb2 as control


class BlocksService:
    def __init__(self, shard: ShardTransport, inflight_nbytes_max: int, streams_max: int) -> None:
        self._shard = shard
        self._inflight_nbytes_max = inflight_nbytes_max
        self._inflight_nbytes = 0
        self._streams_max = streams_max
        self._streams = 0

    async def read(self, asked: blocks.ReadRequest, context: Context) -> None:
        async with self._stream(context), closing(self._chunks(asked, context)) as chunks:
            async for chunk in chunks:
                await context.write(chunk)

    async def _chunks(self, asked: blocks.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        namespace = wire.namespace_in(asked.namespace_id)
        refs = refs_in(self._shard.shard, asked)
        if isinstance(self._shard, ShardDriver):
            self._shard.check_count(len(refs))
            lent = Lent(self._shard, namespace, refs)
            async with closing(_lent_chunks(lent, refs, asked.takes_runs)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        async with closing(self._shard.read(namespace, refs, timeout_s=left(context))) as items:
            async for item in items:
                for chunk in _packed(item.index, item.frame or item.miss or MissReason.ABSENT):
                    yield chunk

    async def write(self, chunks: AsyncIterator[bulk.WriteChunk], context: Context) -> blocks.WriteResponse:
        async with self._stream(context):
            return await self._store(chunks, context)

    @contextlib.asynccontextmanager
    async def _stream(self, context: Context) -> AsyncIterator[None]:
        """A place among the streams, held no longer than the call may take, whatever the peer does.

        Raises OverLimit when all are taken, so that there is always room for calls without bytes.
        """
        if self._streams >= self._streams_max:
            raise OverLimit(f"{self._streams} streams are open on this shard: try again later")
        limit_s = left(context)
        self._streams += 1
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"the stream was not done within {limit_s:.1f} s") from None
        finally:
            self._streams -= 1

    async def _store(self, chunks: AsyncIterator[bulk.WriteChunk], context: Context) -> blocks.WriteResponse:
        answer = blocks.WriteResponse()
        frame, filled = bytearray(), 0
        try:
            async for chunk in chunks:
                if not filled:
                    frame = self._admit_frame(chunk.frame_nbytes)
                end = filled + len(chunk.data)
                if end > len(frame) or not chunk.data:
                    raise ConfigError("chunks run past the frame they announced: send frames in order")
                frame[filled:end] = chunk.data
                filled = end
                if filled == len(frame):
                    view = memoryview(frame)
                    piece = (chunk.index, bytes(view[:HEADER_NBYTES]), view[HEADER_NBYTES:])
                    (refusal,) = await self._shard.write(TxnId(chunk.txn), [piece], timeout_s=left(context))
                    answer.indexes.append(chunk.index)
                    answer.refusals.append(refusal.value if refusal else "")
                    self._inflight_nbytes -= len(frame)
                    frame, filled = bytearray(), 0
        finally:
            self._inflight_nbytes -= len(frame)
        return answer

    def _admit_frame(self, nbytes: int) -> bytearray:
        """A buffer within the budget; whoever takes it gives `len` back.

        Raises ConfigError for a nonsense size, OverLimit beyond the budget.
        """
        if nbytes <= HEADER_NBYTES:
            raise ConfigError(f"a frame of {nbytes} bytes has no room for a header and a payload")
        if self._inflight_nbytes + nbytes > self._inflight_nbytes_max:
            raise OverLimit(f"{self._inflight_nbytes} bytes of writes are in flight: try again later")
        frame = bytearray(nbytes)
        self._inflight_nbytes += nbytes
        return frame


async def _lent_chunks(lent: Lent, refs: Sequence[BlockRef], takes_runs: bool) -> AsyncIterator[bytes]:
    """The messages of all answers, in order. Small frames share one where the reader takes runs."""
    run: list[memoryview] = []  # answers to the positions right before `index`, not sent yet
    room = whole = CHUNK_NBYTES if takes_runs else 0
    try:
        for index, ref in enumerate(refs):
            found = await lent.borrow(ref)
            small = found if isinstance(found, memoryview) and found.nbytes <= whole else None
            if run and (small is None or small.nbytes > room):
                yield bulk.pack_run(index - len(run), run)
                lent.give_back(len(run))
                run, room = [], whole
            if small is not None:
                run.append(small)
                room -= small.nbytes
                continue
            for chunk in _packed(index, found):
                yield chunk
            lent.give_back()
        if run:
            yield bulk.pack_run(len(refs) - len(run), run)
    finally:
        await lent.close()


def _packed(index: int, found: memoryview | MissReason) -> Iterator[bytes]:
    """The messages of one answer, each packed when it is asked for: with one copy of its bytes."""
    if isinstance(found, MissReason):
        yield bulk.pack_miss(index, found.value)
        return
    for start in range(0, found.nbytes, CHUNK_NBYTES):
        yield bulk.pack_read(index, found.nbytes, found[start : start + CHUNK_NBYTES])


def refs_in(shard: ShardId, asked: blocks.ReadRequest | control.ReportRequest) -> list[BlockRef]:
    wire.at_most(KEYS_MAX, max(len(asked.slots), len(asked.generations)), "references")
    if len(asked.slots) != len(asked.generations):
        raise ConfigError(f"{len(asked.slots)} slots and {len(asked.generations)} generations: one each")
    incarnation = Incarnation(asked.incarnation)
    columns = zip(asked.slots, asked.generations, strict=True)
    return [BlockRef(shard, incarnation, slot, generation) for slot, generation in columns]
