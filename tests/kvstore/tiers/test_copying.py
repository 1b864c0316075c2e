"""Memory that a thread works on changes hands only when the thread is done."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvstore.tiers.copying import INLINE_NBYTES_MAX, to_its_end


async def test_a_cancelled_caller_does_not_free_what_a_thread_still_writes() -> None:
    started, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    freed: asyncio.Future[bool] = loop.create_future()
    finished: list[bool] = []

    def work() -> None:
        loop.call_soon_threadsafe(started.set)
        go_on.wait(5)
        finished.append(True)

    task = asyncio.ensure_future(
        to_its_end(INLINE_NBYTES_MAX + 1, work, lambda: freed.set_result(bool(finished)))
    )
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not freed.done(), "the thread is still writing"
    go_on.set()
    assert await asyncio.wait_for(freed, 5)


@pytest.mark.parametrize("nbytes", [1, INLINE_NBYTES_MAX + 1], ids=["inline", "in a thread"])
async def test_work_that_fails_frees_its_memory_at_once(nbytes: int) -> None:
    freed: list[bool] = []

    def work() -> None:
        raise MemoryError("no room to work in")

    with pytest.raises(MemoryError):
        await to_its_end(nbytes, work, lambda: freed.append(True))
    assert freed == [True]
