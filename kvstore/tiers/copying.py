"""Copying frames without holding up the event loop.

numpy's copy and xxh3 release the interpreter lock, a bytearray's copy does not (measured: 50 ms of standstill
for 64 MiB against 0.4 ms). Below `INLINE_NBYTES_MAX` a thread costs more than it gives: about 60 us a hop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import numpy as np

INLINE_NBYTES_MAX: Final = 256 << 10

Result = TypeVar("Result")


def join(*pieces: bytes | memoryview) -> memoryview:
    """One fresh, writable buffer that holds the pieces end to end."""
    sources = [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]
    joined = np.empty(sum(source.nbytes for source in sources), dtype=np.uint8)
    np.concatenate(sources, out=joined)
    return joined.data


def corrupted(frame: memoryview) -> memoryview:
    """A copy with one bit wrong: what a failpoint asks for."""
    copy = join(frame)
    copy[-1] ^= 1
    return copy


def fill(room: memoryview, *pieces: bytes | memoryview) -> None:
    """Copy the pieces, end to end, into `room`, which has just their size."""
    target = np.frombuffer(room, dtype=np.uint8)
    np.concatenate([np.frombuffer(piece, dtype=np.uint8) for piece in pieces], out=target)


async def to_its_end(nbytes: int, work: Callable[[], Result], abandoned: Callable[[], None]) -> Result:
    """`work` over memory that must not change hands while it runs; `abandoned` frees that memory.

    Freed it is when this raises: at once, unless a thread still works on it. A thread cannot be cancelled:
    if the caller is, the memory is freed when the thread is done with it.
    """
    working: asyncio.Future[Result] | None = None
    try:
        if nbytes <= INLINE_NBYTES_MAX:
            return work()
        working = asyncio.get_running_loop().run_in_executor(None, work)
        return await asyncio.shield(working)
    except BaseException:

        def free(done: asyncio.Future[Result]) -> None:
            if not done.cancelled():
                done.exception()  # nobody else asks
            abandoned()

        if working is None or working.done():
            abandoned()
        else:
            working.add_done_callback(free)
        raise


async def beside_the_loop(nbytes: int, work: Callable[[], Result]) -> Result:
    """`work` over `nbytes` bytes: at once if they are few, else in a thread."""
    return work() if nbytes <= INLINE_NBYTES_MAX else await asyncio.to_thread(work)


async def all_done(working: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for threads that work on the caller's memory: however often he is cancelled, and whatever one of
    them raises, until none works any more. Then raises what he, or the first of them, met."""
    cancelled: asyncio.CancelledError | None = None
    pending = set(working)
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
            pending = {one for one in pending if not one.done()}
    failures = [done.exception() for done in working]  # asked of all: none is reported as forgotten
    if cancelled is not None:
        raise cancelled
    for failure in failures:
        if failure is not None:
            raise failure
