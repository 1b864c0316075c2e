"""One task per decode worker: long-polls its events and hands each to the stream of its request.

One message carries a whole engine step's tokens of all sequences, so the cost is per step, not per token. A
worker whose poll breaks off or does not come back is reported gone, and every attempt that ran on it is
over. A sequence that goes on though nobody waits for it (an abort was lost, or overtook the start) is
aborted, once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from engine.types import TokenEvent
from router.errors import WorkerError, WorkerFailed, WorkerGone, WorkerSlow
from router.fleet import Member
from router.handles import DecodeHandle, abort_within
from router.streams import TokenStream

__all__ = ["DecodePump"]

_ANSWER_MARGIN_S: Final = 15.0
"""A poll answers when its own time is up; this much later it is taken for dead."""
_ABORT_S: Final = 5.0
_ABORTED_MAX: Final = 4096
"""Attempts remembered as told to end: more than a worker holds, so that none is told for every token."""

log = structlog.get_logger(__name__)


class DecodePump:
    """Lives as long as its worker. `gone` is told once, with the worker's id and why."""

    def __init__(
        self,
        member: Member[DecodeHandle],
        *,
        poll_s: float,
        gone: Callable[[str, WorkerError], None],
        dropped: Counter[str],
    ) -> None:
        self._member = member
        self._poll_s = poll_s
        self._gone = gone
        self._dropped = dropped
        self._streams: dict[str, TokenStream] = {}
        self._aborted: dict[tuple[str, int], None] = {}  # in order of age
        self._aborting: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run(), name=f"pump {member.facts.worker_id}")

    def attach(self, stream: TokenStream) -> None:
        """Before the worker is told to start: its first event may come at once."""
        self._streams[stream.request_id] = stream

    def detach(self, stream: TokenStream) -> None:
        """Idempotent; another stream of the same request stays."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]

    async def stop(self, reason: WorkerError) -> None:
        """Idempotent. Attempts still on this worker are over."""
        tasks = [self._task, *self._aborting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._end_attempts(reason)

    async def _run(self) -> None:
        cursor = 0
        worker_id = self._member.facts.worker_id
        try:
            while True:
                async with asyncio.timeout(self._poll_s + _ANSWER_MARGIN_S):
                    polled = await self._member.handle.poll(cursor, self._poll_s)
                cursor = polled.cursor
                for event in polled.events:
                    self._hand_on(event)
                for request_id, attempt in polled.preempted:
                    if (stream := self._streams.get(request_id)) is not None:
                        stream.preempted(attempt)
        except WorkerGone as error:
            failure: WorkerError = error
        except TimeoutError:
            failure = WorkerSlow(f"decode worker {worker_id} does not answer polls")
        except Exception as error:
            log.exception("poll failed", worker=worker_id)
            failure = WorkerFailed(f"decode worker {worker_id}: {error}")
        self._end_attempts(failure)
        self._gone(worker_id, failure)

    def _hand_on(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        drop = "unknown_request" if stream is None else stream.offer(event)
        if drop is None:
            return
        self._dropped[drop] += 1
        if drop in ("unknown_request", "old_attempt") and event.finish is None:
            self._abort(event.request_id, event.attempt)

    def _abort(self, request_id: str, attempt: int) -> None:
        if (request_id, attempt) in self._aborted:
            return
        if len(self._aborted) == _ABORTED_MAX:
            del self._aborted[next(iter(self._aborted))]
        self._aborted[request_id, attempt] = None
        member = self._member
        aborting = abort_within(_ABORT_S, member.facts.worker_id, member.handle, request_id, attempt)
        task = asyncio.create_task(aborting, name=f"abort {request_id}")
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    def _end_attempts(self, reason: WorkerError) -> None:
        for stream in self._streams.values():
            stream.fail(reason)
        self._streams.clear()
