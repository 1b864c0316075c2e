"""How everybody keeps their hands off an engine for a moment, so that it may be changed between two steps.

step   [====]     [====]                [====]
admit        [==]                       [==]
held                    |== change ==|            who wants to call waits; who calls is waited for
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

__all__ = ["StepGate"]


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
