"""One request's tokens, in order, each exactly once, whatever happens to the workers that make them.

Every event names (request, attempt, index). A stream takes the event it expects next and drops the rest:
those of an attempt that was given up, and those it has already had. A gap means tokens were lost: the
attempt is over and the next one goes on from the tokens accepted so far.

    expected: attempt 2, index 5
      (attempt 1, index 5)  old_attempt   dropped
      (attempt 2, index 4)  seen          dropped
      (attempt 2, index 5)                accepted; 6 is expected
      (attempt 2, index 7)  gap           the attempt ends with WorkerFailed

The producer side (`offer`, `fail`) never waits. The queue cannot outgrow the request: it holds accepted
tokens, of which there are at most `max_tokens`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

from engine.types import FinishReason, TokenEvent
from kvstore.clock import Clock
from kvstore.errors import ERRORS
from router.errors import RequestError, WorkerError, WorkerFailed, WorkerSlow, refused

__all__ = ["TokenStream"]

_ENDED: Final = (FinishReason.STOP, FinishReason.LENGTH)


class TokenStream:
    """Written by one attempt at a time, read by one consumer. Lives on one event loop."""

    def __init__(self, request_id: str, clock: Clock, progressed: Callable[[], None] = lambda: None) -> None:
        """`progressed` is told of each accepted token, whether or not anybody reads it."""
        self.request_id = request_id
        self.attempt = 0
        self.accepted: list[int] = []
        """Token ids so far, over all attempts: the next attempt's `output_ids`."""
        self.finished = False
        self._clock = clock
        self._progressed = progressed
        self._progress_at = clock.now()
        self._attempt_tokens = 0
        self._preempted = False  # since the last token
        self._queue: deque[TokenEvent] = deque()
        self._attempt_error: WorkerError | None = None
        self._error: RequestError | None = None
        self._readable = asyncio.Event()
        self._changed = asyncio.Event()

    def begin_attempt(self) -> int:
        """From now on only events of the new attempt count."""
        self.attempt += 1
        self._attempt_tokens = 0
        self._preempted = False
        self._attempt_error = None
        return self.attempt

    def offer(self, event: TokenEvent) -> str | None:
        """Take the event if it is the next one; else why it was dropped (the label of a counter)."""
        if event.attempt != self.attempt or self.finished:
            return "old_attempt"
        if event.finish in (FinishReason.ERROR, FinishReason.ABORT):
            self.fail(_reason_of(event))
            return None
        if event.index < len(self.accepted):
            return "seen"
        if event.index > len(self.accepted):
            self.fail(
                WorkerFailed(f"token {len(self.accepted)} was lost: the worker sent {event.index} next")
            )
            return "gap"
        self.accepted.append(event.token_id)
        self._attempt_tokens += 1
        self._preempted = False
        self.finished = event.finish in _ENDED
        self._progress_at = self._clock.now()
        self._progressed()
        self._queue.append(event)
        self._readable.set()
        self._changed.set()
        return None

    def preempted(self, attempt: int) -> None:
        """Its worker has it wait for room again: until its next token that is no stall."""
        self._preempted = self._preempted or attempt == self.attempt

    def fail(self, error: WorkerError) -> None:
        """The attempt is over. What was accepted stays."""
        self._attempt_error = self._attempt_error or error
        self._changed.set()

    def check(self) -> None:
        """Raises what the attempt has failed with, if it has."""
        if self._attempt_error is not None:
            raise self._attempt_error

    def close(self, error: RequestError) -> None:
        """The request is over: the consumer gets what was accepted, then the error."""
        self._error = error
        self._readable.set()

    async def attempt_over(self, begin_s: float, stall_s: float) -> None:
        """Wait until the last token was accepted. Raises the attempt's WorkerError, or WorkerSlow when no
        token came for `stall_s`; `begin_s` until the attempt's second token, which is decode's first, and
        when it was preempted: before that token decode may wait for room and compute again."""
        while not self.finished:
            self.check()
            limit_s = begin_s if self._preempted or self._attempt_tokens <= 1 else stall_s
            left = self._progress_at + limit_s - self._clock.now()
            if left <= 0:
                raise WorkerSlow(f"no token came for {limit_s:.0f} s")
            self._changed.clear()
            # Not wait_for: before Python 3.12 it loses a cancellation that meets the event.
            with contextlib.suppress(TimeoutError):  # the clock decides, at the top of the loop
                async with asyncio.timeout(left):
                    await self._changed.wait()

    async def next(self) -> TokenEvent | None:
        """The next token in order; None after the last. Raises what the request was closed with."""
        while True:
            if self._queue:
                return self._queue.popleft()
            if self._error is not None:
                raise self._error
            if self.finished:
                return None
            self._readable.clear()
            await self._readable.wait()


def _reason_of(event: TokenEvent) -> WorkerError:
    """Why a worker ended the sequence. A worker's error is told as "Name: message", the name that of the
    store's error where it is one."""
    message = event.error or f"the worker ended with {event.finish.value if event.finish else 'nothing'}"
    kind = ERRORS.get(message.partition(":")[0])
    return refused(message, kind.status) if kind is not None else WorkerFailed(message)
