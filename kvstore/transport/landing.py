"""Where a read into the caller's own memory lands: columns, one row a block, filled by a transport.

A transport copies headers into `headers`, payloads into the caller's buffers (encoded ones, which are decoded
from there, into memory of the landing), and notes the xxh3 of what it copied *after* copying it: of the
destination, never of the source. It judges nothing: `frame_columns.py` does, over all rows at once. Rows may
be filled by several threads, each its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import xxhash

from kvstore.closing import closing
from kvstore.errors import Unavailable
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockRef, MissReason, NamespaceId
from kvstore.transport.base import ShardTransport

NOTHING: Final = -1
PIECE_NBYTES: Final = 1 << 20  # hashed while some of it is in the cache; smaller pieces copy more slowly
LOCKED_NBYTES_MAX: Final = 128 << 10  # up to here letting go of the interpreter lock costs more than it gives


class Landing:
    __slots__ = ("checksums", "encoded", "encoded_sizes", "headers", "misses", "payload_nbytes", "payloads")

    def __init__(self, payloads: Sequence[memoryview], encoded_sizes: Collection[int] = ()) -> None:
        """`payloads[i]`: writable flat bytes, of the size a lossless payload has. `encoded_sizes`: those that
        an encoded one may have, all smaller."""
        n = len(payloads)
        self.payloads = payloads
        self.headers = np.zeros((n, HEADER_NBYTES), dtype=np.uint8)
        self.payload_nbytes = np.full(n, NOTHING, dtype=np.int64)  # of the frame that came
        self.checksums = np.zeros(n, dtype=np.uint64)  # xxh3 of payloads[i], or of encoded[i]
        self.encoded_sizes = encoded_sizes
        self.encoded: dict[int, memoryview] = {}  # by row, where an encoded payload came
        self.misses: list[MissReason | None] = [None] * n  # why nothing came, where that is known

    def land(self, row: int, frame: memoryview) -> None:
        """A whole frame. A payload of another size than the row's is only noted."""
        self.headers[row] = np.frombuffer(frame[:HEADER_NBYTES], dtype=np.uint8)
        payload = frame[HEADER_NBYTES:]
        self.payload_nbytes[row] = payload.nbytes
        room = self.room(row, payload.nbytes)
        if room is not None:
            self.checksums[row] = copy_and_hash(room, payload)

    def room(self, row: int, nbytes: int) -> memoryview | None:
        """Where a payload of this size of the row goes: the caller's buffer, or memory that is decoded from
        later. None: no payload of the row has that size, only its header is of interest."""
        if nbytes == self.payloads[row].nbytes:
            return self.payloads[row]
        if nbytes not in self.encoded_sizes:
            return None
        room = self.encoded[row] = np.empty(nbytes, dtype=np.uint8).data
        return room

    def void(self, row: int, reason: MissReason) -> None:
        """Whatever lies in the row's buffer is not to be used."""
        self.payload_nbytes[row] = NOTHING
        self.misses[row] = reason


def copy_and_hash(target: memoryview, source: memoryview) -> int:
    """The xxh3 of `target` after `source` was copied there, both flat bytes of one size."""
    if target.nbytes <= PIECE_NBYTES:
        copy(target, source)
        return xxhash.xxh3_64_intdigest(target)
    digest = xxhash.xxh3_64()
    for start in range(0, target.nbytes, PIECE_NBYTES):
        piece = target[start : start + PIECE_NBYTES]
        copy(piece, source[start : start + PIECE_NBYTES])
        digest.update(piece)
    return digest.intdigest()


def copy(target: memoryview, source: memoryview) -> None:
    if source.nbytes <= LOCKED_NBYTES_MAX:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


class LandingTransport(ABC):
    """A transport that can fill a landing without an intermediate copy.

    A base class, not a Protocol: asking at run time whether a Protocol is obeyed took 1.2 ms a read.
    """

    @abstractmethod
    async def read_into(
        self,
        namespace: NamespaceId,
        refs: Sequence[BlockRef],
        landing: Landing,
        rows: Sequence[int],
        *,
        timeout_s: float,
    ) -> None:
        """Fill `rows[i]` from `refs[i]`, or void it. Raises as `read` does: some rows are neither then."""
        ...


async def read_into(
    transport: ShardTransport,
    namespace: NamespaceId,
    refs: Sequence[BlockRef],
    landing: Landing,
    rows: Sequence[int],
    *,
    timeout_s: float,
) -> None:
    """`LandingTransport.read_into` over any transport."""
    if isinstance(transport, LandingTransport):
        await transport.read_into(namespace, refs, landing, rows, timeout_s=timeout_s)
        return
    async with closing(transport.read(namespace, refs, timeout_s=timeout_s)) as items:
        async for item in items:
            row = rows[item.index]
            if item.frame is None:
                landing.void(row, item.miss or MissReason.ABSENT)
            elif item.frame.nbytes < HEADER_NBYTES:
                landing.void(row, MissReason.BAD_HEADER)
            else:
                landing.land(row, item.frame)


def row_in(rows: Sequence[int], index: int) -> int:
    """The landing's row of a shard's answer. Raises Unavailable for one that was never asked for."""
    if not 0 <= index < len(rows):
        raise Unavailable(
            f"an answer to question {index} of {len(rows)}: the peer does not speak our framing"
        )
    return rows[index]
