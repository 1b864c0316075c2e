"""From a prompt's ids to text, piece by piece: admission, attempts over the fleet, detokenisation.

A request's life: `admit` (or Overloaded) -> `generate` -> pieces until one has a finish reason. Closing the
generator early (the client left, a stop string came) frees what the workers hold. Cost on the event loop:
one small task a request, and per token one detokenisation of about 10 us.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from engine.detokenizer import IncrementalDetokenizer
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, GenerationRequest, PrefillStats, TokenEvent, TokenLogprobs
from kvstore.clock import Clock, MonotonicClock
from router.attempts import AttemptLimits, Attempts, Job
from router.errors import BadRequest, Overloaded, WorkerError, WorkerGone
from router.fleet import Fleet, Member
from router.handles import DecodeHandle, PrefillHandle, announce_within
from router.metrics import RouterMetrics
from router.pump import DecodePump
from router.streams import TokenStream

__all__ = ["Orchestrator", "Piece"]

_POLL_S: Final = 5.0
_ANNOUNCING_MAX: Final = 64
"""Prompts that wait for a worker and are being announced to the store; more are not, and are counted."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer. `text` is what became safe to show with it, often "". The last has `finish`."""

    token_id: int
    text: str
    finish: FinishReason | None
    stats: PrefillStats | None = None  # on the first
    logprobs: TokenLogprobs | None = None  # if asked for, but not of an end token: it is no part of the text
    epochs: tuple[int, ...] = ()  # of the weights that drew it and of the KV behind it


class Orchestrator:
    """Lives on one event loop. Workers are added and removed by whoever runs them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        metrics: RouterMetrics,
        *,
        running_max: int = 256,
        limits: AttemptLimits | None = None,
        clock: Clock | None = None,
        gone: Callable[[str], None] = lambda _worker_id: None,
    ) -> None:
        self.fleet = Fleet()
        self.running = 0
        self.idle = asyncio.Event()
        """Set while no request runs."""
        self.idle.set()
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._running_max = running_max
        self._limits = limits or AttemptLimits()
        self._clock = clock or MonotonicClock()
        self._gone = gone
        self._pumps: dict[str, DecodePump] = {}
        self._dropped: Counter[str] = metrics.dropped_events
        self._progress_at = self._clock.now()
        self._streams: set[TokenStream] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._announcing = 0

    def add_prefill(self, member: Member[PrefillHandle]) -> None:
        self.fleet.add_prefill(member)

    def add_decode(self, member: Member[DecodeHandle]) -> None:
        self._pumps[member.facts.worker_id] = DecodePump(
            member, poll_s=_POLL_S, gone=self._lost, dropped=self._dropped
        )
        self.fleet.add_decode(member)

    async def remove(self, worker_id: str, why: str) -> None:
        """Take a worker out. Its attempts end and go on elsewhere. Idempotent."""
        self.fleet.remove(worker_id)
        pump = self._pumps.pop(worker_id, None)
        if pump is not None:
            await pump.stop(WorkerGone(f"worker {worker_id} was taken out: {why}"))

    @contextmanager
    def admit(self, requests: int = 1, field: str = "prompt") -> Iterator[None]:
        """Room for so many requests, or Overloaded; BadRequest for more than there ever is room for, which
        names the body's `field` that makes them many."""
        if requests > self._running_max:
            raise BadRequest(
                f"the body asks for {requests} answers and at most {self._running_max} requests run at once "
                "here: send fewer prompts, lower n, or raise router.running_max",
                param=field,
            )
        if self.running + requests > self._running_max:
            self._metrics.admission_rejections.labels("running_max").inc()
            raise Overloaded(
                f"{self.running} requests run and at most {self._running_max} may. Retry in a moment, or "
                "raise router.running_max"
            )
        self.running += requests
        self.idle.clear()
        try:
            yield
        finally:
            self.running -= requests
            if self.running == 0:
                self.idle.set()

    async def generate(self, job: Job) -> AsyncGenerator[Piece]:
        """Pieces in order, the last with a finish reason. Raises RequestError, also after some pieces."""
        if not self._tokens_awaited:
            self._progress()
        stream = TokenStream(job.request_id, self._clock, self._progress)
        self._streams.add(stream)
        attempts = Attempts(
            job,
            stream,
            self.fleet,
            self._pumps,
            self._limits,
            self._clock,
            failed=self._attempt_failed,
            dropped=self._dropped,
            announce=self._announce,
        )
        driver = asyncio.create_task(attempts.run(), name=f"drive {job.request_id}")
        record = self._metrics.request(len(job.prompt_ids), self._clock)
        text = _Text(self._tokenizer, job)
        try:
            while (event := await stream.next()) is not None:
                first = record.token(attempts.stats)
                piece = text.piece(event, attempts.stats if first else None)
                if piece.finish is not None:
                    record.finished(piece.finish)
                yield piece
                if piece.finish is not None:
                    return
        finally:
            self._streams.discard(stream)
            record.closed()
            self._spawn(_wind_up(driver, attempts))

    def stalled_s(self) -> float:
        """Seconds since a worker brought a token for any request; 0 when no request waits for one. How
        fast clients read does not matter."""
        return self._clock.now() - self._progress_at if self._tokens_awaited else 0.0

    async def close(self) -> None:
        """End the pumps, then what is left of requests. Bounded by the limits' `abort_s`."""
        for worker_id in [*self.fleet.prefill, *self._pumps]:
            await self.remove(worker_id, "the service ends")
        if self._background:
            await asyncio.wait(self._background, timeout=self._limits.abort_s)

    @property
    def _tokens_awaited(self) -> bool:
        return any(not stream.finished for stream in self._streams)

    def _progress(self) -> None:
        self._progress_at = self._clock.now()

    def _announce(self, worker: PrefillHandle, request: GenerationRequest) -> None:
        if self._announcing >= _ANNOUNCING_MAX:
            self._metrics.prefetch_announcements.labels("dropped").inc()
            return
        self._announcing += 1
        self._spawn(self._announced(worker, request))

    async def _announced(self, worker: PrefillHandle, request: GenerationRequest) -> None:
        try:
            told = await announce_within(self._limits.abort_s, worker, request)
            self._metrics.prefetch_announcements.labels("told" if told else "failed").inc()
        finally:
            self._announcing -= 1

    def _attempt_failed(self, worker_id: str, error: WorkerError) -> None:
        self._metrics.attempt_failed(error)
        if isinstance(error, WorkerGone):
            self._is_gone(worker_id)

    def _lost(self, worker_id: str, error: WorkerError) -> None:
        self._pumps.pop(worker_id, None)
        self._is_gone(worker_id)

    def _is_gone(self, worker_id: str) -> None:
        """No further attempt meets it, and it is replaced at once. Idempotent."""
        if self.fleet.remove(worker_id):
            self._gone(worker_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


class _Text:
    """A job's tokens to pieces: what stops it by text, and what never shows."""

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, job.sampling.stop, job.sampling.min_tokens)
        self._hidden = frozenset(job.sampling.stop_token_ids)

    def piece(self, event: TokenEvent, stats: PrefillStats | None) -> Piece:
        stopped_by_id = event.finish is FinishReason.STOP and event.token_id in self._hidden
        text = "" if stopped_by_id else self._detokenizer.push(event.token_id)
        finish = event.finish
        ended_by_id = finish is FinishReason.STOP and not self._detokenizer.finished_by_stop
        if self._detokenizer.finished_by_stop:
            finish = FinishReason.STOP
        elif finish is not None:
            text += self._detokenizer.flush()
            # The text held back may complete a stop string when it is let out.
            finish = FinishReason.STOP if self._detokenizer.finished_by_stop else finish
        logprobs = None if ended_by_id else event.logprobs
        return Piece(event.token_id, text, finish, stats, logprobs, event.epochs)


async def _wind_up(driver: asyncio.Task[None], attempts: Attempts) -> None:
    driver.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await driver
    await attempts.free()
