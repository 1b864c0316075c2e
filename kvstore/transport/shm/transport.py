"""A shard over gRPC whose bytes go through shared memory where that turns out to be possible.

Control calls are gRPC's always. Frames are read from the shard's arena and written through a window of our
own as long as an attachment lives; what the arena does not hold, and everything when there is none, goes
over gRPC. Nothing is configured and nothing fails for want of it: `shm:...` counters say what happened.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Final

import grpc
import structlog

from kvstore import failpoints
from kvstore.closing import closing
from kvstore.deadline import Deadline
from kvstore.errors import Unavailable
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockRef, MissReason, NamespaceId, Refusal, ShardId, TxnId
from kvstore.tiers.copying import INLINE_NBYTES_MAX, all_done, beside_the_loop
from kvstore.transport.base import ReadItem, ShardHello
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.transport.landing import LOCKED_NBYTES_MAX, Landing
from kvstore.transport.shm.client import Attachment, NotHere, attach, fits
from kvstore.transport.shm.reader import ArenaReader

log = structlog.get_logger(__name__)

ATTACH_AGAIN_S: Final = 5.0  # after a loss, at most this often
ATTACH_S: Final = 1.0  # a socket of this host answers at once or not at all
THREADS: Final = 2  # of one large read whose copies let go of the interpreter lock
LARGE_NBYTES: Final = 4 << 20


class SameHostTransport(GrpcTransport):
    def __init__(
        self,
        shard: ShardId,
        address: str,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        counters: Counter[str] | None = None,
    ) -> None:
        super().__init__(shard, address, token, credentials)
        self._token = token or ""
        self._counters = Counter() if counters is None else counters
        self._attached: Attachment | None = None
        self._attachable = False  # it was attached once, and may be again
        self._again_at = 0.0
        self._frame_nbytes = INLINE_NBYTES_MAX  # of the last read: what decides who copies

    @property
    def shares_memory(self) -> bool:
        """Are frames of this shard read from its arena now?"""
        return self._reader is not None

    async def hello(self, *, timeout_s: float) -> ShardHello:
        deadline = Deadline(timeout_s)
        self._again_at = asyncio.get_running_loop().time() + ATTACH_AGAIN_S
        greeted = await super().hello(timeout_s=timeout_s)
        if not greeted.shm_socket:
            self._detach()
            self._attachable = False
            return greeted
        try:
            limit_s = min(ATTACH_S, deadline.left())
            attached = await attach("\0" + greeted.shm_socket, self._token, greeted.incarnation, limit_s)
        except NotHere as error:
            self._detach()
            self._counters["shm:not_here"] += 1
            log.info("frames of this shard go over gRPC", shard=self.shard, why=str(error))
            return greeted
        except BaseException:
            self._greeted = False  # the next call finds out what we could not
            raise
        if self._closed:
            attached.close()  # nobody would after us
            return greeted
        self._detach()  # whichever there is by now: two may say hello at once
        self._attached, self._attachable = attached, True
        self._counters["shm:attached"] += 1
        return greeted

    async def _introduced(self, timeout_s: float) -> Deadline:
        deadline = await super()._introduced(timeout_s)
        if self._attachable and self._reader is None and asyncio.get_running_loop().time() >= self._again_at:
            await self.hello(timeout_s=deadline.left())
        return deadline

    async def read(
        self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> AsyncIterator[ReadItem]:
        deadline = await self._introduced(timeout_s)
        for i, ref in enumerate(refs):
            reader = self._reader
            if reader is None:
                async with closing(super().read(namespace, refs[i:], timeout_s=deadline.left())) as rest:
                    async for item in rest:
                        yield ReadItem(i + item.index, item.frame, item.miss)
                return
            await failpoints.hit("transport.read")
            got = await beside_the_loop(self._frame_nbytes, lambda r=reader, ref=ref: r.read(ref))  # type: ignore[misc]
            if got is None:
                self._counters["shm:asked_shard"] += 1
                async with closing(super().read(namespace, [ref], timeout_s=deadline.left())) as asked:
                    async for item in asked:
                        yield ReadItem(i, item.frame, item.miss)
            elif isinstance(got, MissReason):
                yield ReadItem(i, None, got)
            else:
                self._frame_nbytes = got.nbytes
                self._counters["shm:read_bytes"] += got.nbytes
                yield ReadItem(i, got.data, None)

    async def read_into(
        self,
        namespace: NamespaceId,
        refs: Sequence[BlockRef],
        landing: Landing,
        rows: Sequence[int],
        *,
        timeout_s: float,
    ) -> None:
        deadline = await self._introduced(timeout_s)
        reader = self._reader
        asked = list(range(len(refs)))
        if reader is not None:
            await failpoints.hit("transport.read")
            asked = await _read_into(reader, refs, landing, rows)
            self._counters["shm:read_blocks"] += len(refs) - len(asked)
        if asked:
            self._counters["shm:asked_shard"] += len(asked) if reader is not None else 0
            some, into = [refs[i] for i in asked], [rows[i] for i in asked]
            await super().read_into(namespace, some, landing, into, timeout_s=deadline.left())

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], *, timeout_s: float
    ) -> list[Refusal | None]:
        deadline = await self._introduced(timeout_s)
        attached = self._attached
        if attached is not None and self._reader is not None and fits(frames):
            await failpoints.hit("transport.write")
            try:
                refusals = await attached.write(txn, frames, deadline.left())
                self._counters["shm:written_bytes"] += sum(HEADER_NBYTES + p.nbytes for _, _, p in frames)
                return refusals
            except Unavailable as error:
                self._counters["shm:lost"] += 1
                log.warning("frames go over gRPC", shard=self.shard, why=str(error))
        return await super().write(txn, frames, timeout_s=deadline.left())

    async def close(self) -> None:
        self._detach()
        await super().close()

    @property
    def _reader(self) -> ArenaReader | None:
        return self._attached.reader if self._attached is not None else None

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.close()
            self._attached = None


async def _read_into(
    reader: ArenaReader, refs: Sequence[BlockRef], landing: Landing, rows: Sequence[int]
) -> list[int]:
    """In as many threads as it is worth. A caller who is cancelled waits for them: the buffers are his."""
    nbytes = sum([landing.payloads[row].nbytes for row in rows])
    if nbytes <= INLINE_NBYTES_MAX:
        return reader.read_into(refs, landing, rows)
    side_by_side = nbytes >= LARGE_NBYTES and nbytes > len(refs) * LOCKED_NBYTES_MAX
    parts = min(THREADS, len(refs)) if side_by_side else 1
    bounds = [len(refs) * i // parts for i in range(parts + 1)]
    loop = asyncio.get_running_loop()
    working = [
        loop.run_in_executor(None, reader.read_into, refs[start:end], landing, rows[start:end])
        for start, end in itertools.pairwise(bounds)
    ]
    await all_done(working)
    asked = [done.result() for done in working]
    return [start + i for start, some in zip(bounds, asked, strict=False) for i in some]
