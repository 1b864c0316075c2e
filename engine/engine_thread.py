"""The one thread that an engine lives in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["EngineThread"]

P = ParamSpec("P")
T = TypeVar("T")


class EngineThread:
    """The one thread that loads and runs an engine. Calls run one by one, in the order they are asked."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Queue the call at once, before this returns; the future is the event loop's."""
        return asyncio.wrap_future(self._executor.submit(call, *args, **kwargs))

    async def close(self) -> None:
        """Waits for the call that runs; those that wait are dropped."""
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)
