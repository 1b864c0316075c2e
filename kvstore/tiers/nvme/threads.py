"""A small pool of threads for I/O: a call that began is never abandoned in the middle of its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


class Threads:
    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def run(self, work: Callable[[], Result]) -> Result:
        """`work` in a thread. If the caller is cancelled this still waits for the thread, then raises."""
        working = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait([working])
            if not working.cancelled():
                working.exception()  # nobody else asks
            raise

    def close(self) -> None:
        self._executor.shutdown(wait=True)
