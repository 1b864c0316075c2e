"""The one thread that an engine lives in, and how everybody keeps their hands off it for a moment.

step   [====]     [====]                [====]
admit        [==]                       [==]
held                    |== change ==|            who wants to call waits; who calls is waited for
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["EngineThread", "StepGate"]

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


class StepGate:
    """Between steps and admissions on one side and a change of the engine on the other. One event loop's."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._quiet = asyncio.Event()
        self._calls = 0

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    async def opened(self) -> None:
        """Wait while it is held. In the turn in which this returns `passing` may be entered."""
        while not self._open.is_set():
            await self._open.wait()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Around a step or an admission, and all that is told of it."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._quiet.set()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nobody passes. One holder at a time: the caller sees to that."""
        self._open.clear()
        try:
            while self._calls:
                self._quiet.clear()
                await self._quiet.wait()
            yield
        finally:
            self._open.set()
