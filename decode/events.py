"""The event log: tokens of all sequences of a worker, in order, for those who poll with a cursor.

    polled with 40                  cursor 46
                |                   |
    ... 38 39 | 40 41 42 43 44 45 | <- append        at most `events_max` are kept, the oldest go first

One append a token, one wake-up an engine step, so one answer carries a whole step's tokens. Nothing is taken
out by a poll: it may be repeated, and several may poll. A poller that fell further behind than the log is
long sees a gap in the `index` of some request; `dropped` counts what was let go.
"""

from __future__ import annotations

import asyncio
from collections import deque

from engine.types import PollResult, TokenEvent

__all__ = ["EventLog"]


class EventLog:
    """One event loop's. Cursor 0 is before the first event ever."""

    def __init__(self, events_max: int) -> None:
        self.dropped = 0
        self._events: deque[TokenEvent | None] = deque(maxlen=events_max)
        self._end = 0  # the cursor behind the newest event
        self._appended = asyncio.Event()

    def append(self, event: TokenEvent) -> None:
        if len(self._events) == self._events.maxlen:
            self.dropped += 1
        self._events.append(event)
        self._end += 1
        self._appended.set()

    def forget(self, request_id: str, below_attempt: int) -> None:
        """Blank out what superseded attempts of a request said. Walks the log: superseding is rare."""
        for i, event in enumerate(self._events):
            if event is not None and event.request_id == request_id and event.attempt < below_attempt:
                self._events[i] = None

    async def wait(self, cursor: int, timeout_s: float) -> PollResult:
        """Events since `cursor`; waits up to `timeout_s` for the first. A cursor of another log (of this
        worker before a restart) is answered from the oldest event kept."""
        try:
            async with asyncio.timeout(timeout_s):
                while cursor == self._end:
                    self._appended.clear()
                    await self._appended.wait()
        except TimeoutError:
            return PollResult(self._end, ())
        return self._since(cursor)

    def _since(self, cursor: int) -> PollResult:
        start = self._end - len(self._events)
        skip = cursor - start if start <= cursor <= self._end else 0
        events = (self._events[i] for i in range(skip, len(self._events)))
        return PollResult(self._end, tuple(event for event in events if event is not None))
