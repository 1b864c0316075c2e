"""What the router remembers of weights that changed: who may begin, and under which an answer may go on.

    epoch 1 --recompute--> 2 --keep--> 3        an answer that began under 1 goes on under 2 or 3
    epoch 1 --abort------> 2                    it has nowhere to go on: that is its error, at once

An answer under two sets of weights is neither's, so it is a stated error; unless the mode of the update says
that what runs goes on (docs/design.md 12.2).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final

from kvstore.nouns import Epoch

__all__ = ["Intake", "Transitions"]

_REMEMBERED_MAX: Final = 256
"""Epochs that are over. Answers of older ones wait in vain for a worker of theirs, and end with an error."""


class Transitions:
    """Epochs that are over, and what became of their answers. One event loop's."""

    def __init__(self) -> None:
        self._next: dict[Epoch, Epoch | None] = {}  # None: nothing

    def over(self, epochs: Iterable[Epoch], new: Epoch, *, goes_on: bool) -> None:
        """No worker will ever have these again, but `new`; their answers go on under it, or not."""
        for epoch in epochs:
            if epoch != new:
                self._next.pop(epoch, None)
                self._next[epoch] = new if goes_on else None
        while len(self._next) > _REMEMBERED_MAX:
            del self._next[next(iter(self._next))]

    def leads(self, began: Epoch, to: Epoch) -> bool:
        """May an answer that began under one go on under the other? The same: always."""
        return to in self._after(began)

    def is_over(self, began: Epoch) -> bool:
        """Is there nothing that an answer which began under it may go on under?"""
        return self._next.get(self._after(began)[-1], began) is None

    def _after(self, began: Epoch) -> list[Epoch]:
        """It, and what may follow it. Numbers only grow, so this ends."""
        path = [began]
        while (following := self._next.get(path[-1])) is not None:
            path.append(following)
        return path


class Intake:
    """Requests that have begun; new ones wait while it is held. One event loop's."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._begun = 0

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """One request's life, from its first attempt to its end. Waits while nobody may begin: whoever holds
        them back does so for a bounded time."""
        while not self._open.is_set():
            await self._open.wait()
        self._begun += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._begun -= 1
            if self._begun == 0:
                self._idle.set()

    async def emptied(self) -> None:
        """Wait until nothing runs that has begun."""
        await self._idle.wait()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody new begins. One holder at a time."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()
