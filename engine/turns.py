"""Turns at something that serves few at one time: by priority, then by deadline, then by who came first.

    asks -> [ waiting, in order ] -> has its turn -> done, or overtaken: back into the line, at its old place

Who has its turn and cannot go on looks whether somebody more urgent has come meanwhile, and lets that one go
first. The line is as long as its callers let it be; who is cancelled leaves it. Cost: O(waiting) a turn.
"""

from __future__ import annotations

import asyncio
import bisect
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from engine.types import GenerationRequest
from kvstore.errors import DeadlineExceeded

__all__ = ["OrderedTurns", "Urgency", "too_late", "urgency_of"]


class Urgency(NamedTuple):
    """Smaller goes first. `newcomer`: those who were here before go ahead of those who were not."""

    priority: int
    newcomer: bool
    deadline_at: float  # monotonic seconds; infinite: none
    arrival: int


def urgency_of(request: GenerationRequest, arrived_at: float, arrival: int) -> Urgency:
    """Of a request that has not run yet. A deadline is that of the first token: with output it is met."""
    left_s = math.inf if request.deadline_s is None or request.output_ids else request.deadline_s
    return Urgency(request.priority, True, arrived_at + left_s, arrival)


class OrderedTurns:
    """At most `at_once` at one time. One event loop's. With `beyond`, and one more for who is of another
    priority than all who have theirs, a more urgent one: whatever they wait for, it waits for none of them.
    So there are at most as many more as there are priorities."""

    def __init__(self, at_once: int, *, beyond: bool = False) -> None:
        self._at_once = at_once
        self._beyond = beyond
        self._having: list[int] = []  # the priorities of those who have their turn
        self._waiting: list[tuple[Urgency, int, asyncio.Future[None]]] = []
        self._asked = 0

    def locked(self) -> bool:
        """Would one that asks now have to wait?"""
        return len(self._having) >= self._at_once or bool(self._waiting)

    def is_overtaken(self, urgency: Urgency) -> bool:
        """Does somebody wait who goes before this one?"""
        return bool(self._waiting) and self._waiting[0][0] < urgency

    @asynccontextmanager
    async def turn(self, urgency: Urgency) -> AsyncIterator[None]:
        """Held while the caller has its turn. Bound the wait by asyncio.timeout."""
        await self._begin(urgency)
        try:
            yield
        finally:
            self._end(urgency)

    async def _begin(self, urgency: Urgency) -> None:
        if not self.locked() or self._goes_beyond(urgency):
            self._having.append(urgency.priority)
            return
        self._asked += 1  # no two entries compare as equal: futures have no order
        entry = urgency, self._asked, asyncio.get_running_loop().create_future()
        bisect.insort(self._waiting, entry)
        try:
            await entry[2]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif not entry[2].cancelled():
                self._end(urgency)  # its turn had come
            raise

    def _goes_beyond(self, urgency: Urgency) -> bool:
        return self._beyond and urgency.priority < min(self._having)

    def _end(self, urgency: Urgency) -> None:
        self._having.remove(urgency.priority)
        while self._waiting:
            first, _, turn = self._waiting[0]
            if len(self._having) >= self._at_once and not self._goes_beyond(first):
                return
            del self._waiting[0]
            if not turn.done():  # else it was given up, and its waiter has not heard of it yet
                self._having.append(first.priority)
                turn.set_result(None)


def too_late(request: GenerationRequest) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"request {request.request_id} waited for its turn beyond its deadline of {request.deadline_s} s: "
        "allow more, give it a lower priority number, or add workers"
    )
