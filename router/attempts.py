"""One request's way over the workers: prefill, handoff, decode; and again elsewhere when one of them fails.

    attempt 1   prefill(prompt)            -> token 0, streamed at once -> handoff -> decode.start -> 1 2 3 x
    attempt 2   prefill(prompt + 0 1 2 3)  -> token 4                   -> handoff -> decode.start -> 5 6 ...

A later attempt goes on from the tokens already accepted: sampling noise is a function of (seed, position),
so the client sees one answer. It stays within the epoch of the first token, unless an update says that what
runs goes on (router/epochs.py): KV and text of two sets of weights in one answer would be neither's. A full
worker costs a wait, no attempt: the next try comes a little later, elsewhere if there is an elsewhere, until
patience ends. Every wait is bounded; at the end, however it ends, the workers are told to free what they
hold.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import structlog

from engine.types import FirstToken, GenerationRequest, Handoff, PrefillStats, SamplingParams
from kvstore.clock import Clock
from kvstore.errors import KVStrataError
from kvstore.nouns import Epoch
from router.errors import (
    BadRequest,
    DeadlinePassed,
    GenerationFailed,
    NotReady,
    Overloaded,
    RequestError,
    WorkerBusy,
    WorkerError,
    WorkerFailed,
    WorkerGone,
    WorkerSlow,
    refused,
)
from router.fleet import Fleet, Member, Pair
from router.handles import DecodeHandle, PrefillHandle, WorkerHandle, abort_within
from router.pump import DecodePump
from router.streams import TokenStream

__all__ = ["AttemptLimits", "Attempts", "Job"]

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to complete. `request_id` is this router's own: no client chooses it."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = "default"
    priority: int = 0
    deadline_s: float | None = None  # to the first token


@dataclass(frozen=True, slots=True)
class AttemptLimits:
    """The bounds of every wait. Seconds."""

    attempts_max: int = 3
    prefill_s: float = 120.0  # for the first token, for decode's first, and the next one when preempted
    call_s: float = 30.0  # handoff, decode.start
    stall_s: float = 60.0  # between two tokens of decode
    recovery_s: float = 45.0  # for a worker to come back, when none is left, or to have room
    retry_s: float = 0.1  # before a full worker is asked again; doubles
    retry_s_max: float = 2.0
    abort_s: float = 5.0


class Attempts:
    """Drives one job into its stream. `run` is a task's body; it never raises but to be cancelled."""

    def __init__(
        self,
        job: Job,
        stream: TokenStream,
        fleet: Fleet,
        pumps: Mapping[str, DecodePump],
        limits: AttemptLimits,
        clock: Clock,
        *,
        failed: Callable[[str, WorkerError], None],
        dropped: Counter[str],
        announce: Callable[[PrefillHandle, GenerationRequest], None],
    ) -> None:
        """`failed` is told each attempt's worker and why it failed; `announce` is to have a worker announce
        a prompt that has to wait, and neither waits nor raises."""
        self.stats: PrefillStats | None = None
        """Of the first attempt that answered."""
        self._job = job
        self._stream = stream
        self._fleet = fleet
        self._pumps = pumps
        self._limits = limits
        self._clock = clock
        self._began = clock.now()
        self._failed = failed
        self._dropped = dropped
        self._announce = announce
        self._announced = False
        self._busy_since: float | None = None
        self._retry_s = limits.retry_s
        self._epoch: Epoch | None = None
        self._avoid: set[str] = set()
        self._at = ""
        self._holders: list[tuple[str, WorkerHandle, int]] = []

    async def run(self) -> None:
        """Until the stream has its last token or is closed with the error the client gets."""
        try:
            async with self._fleet.intake.passing():
                await self._try_until_done()
        except RequestError as error:
            self._stream.close(error)
        except Exception as error:
            log.exception("request failed", request=self._job.request_id)
            self._stream.close(
                GenerationFailed(f"the router failed on this request ({type(error).__name__})")
            )

    async def free(self) -> None:
        """Tell every worker that may still hold something of this job. Bounded; a dead one holds nothing."""
        limit_s, request_id = self._limits.abort_s, self._job.request_id
        aborts = (abort_within(limit_s, name, handle, request_id, n) for name, handle, n in self._holders)
        await asyncio.gather(*aborts)
        self._holders.clear()  # not before: whoever is cancelled here is followed by one who asks again

    async def _try_until_done(self) -> None:
        failures = 0
        while True:
            pair = await self._pick()
            try:
                await self._attempt(pair, self._stream.begin_attempt())
                return
            except WorkerError as error:
                reason = error
            log.warning("attempt failed", request=self._job.request_id, error=str(reason))
            self._failed(self._at, reason)
            self._avoid.add(self._at)
            await self.free()
            if isinstance(reason, WorkerBusy):
                self._announce_once(pair.prefill.handle)
                await self._be_patient(reason)
                continue
            self._busy_since = None
            failures += 1
            if failures == self._limits.attempts_max:
                raise GenerationFailed(
                    f"{failures} attempts failed, the last one because: {reason}. Retry; if it stays, see "
                    "`kvstrata status` and the workers' logs"
                )

    async def _be_patient(self, busy: WorkerBusy) -> None:
        """Wait a little. Raises Overloaded or NotReady when the workers stay busy for `recovery_s`."""
        now, limit_s = self._clock.now(), self._limits.recovery_s
        if self._busy_since is None:
            self._busy_since, self._retry_s = now, self._limits.retry_s
        if now + self._retry_s - self._busy_since > limit_s:
            told = f"no worker could take the request for {limit_s:.0f} s, the last one said: {busy}. Retry "
            if busy.full:
                raise Overloaded(
                    told + "later, ask for fewer tokens, or add workers or raise engine.pool_nbytes"
                )
            raise NotReady(told + "in a few seconds")
        await asyncio.sleep(self._retry_s * random.uniform(0.5, 1.0))  # noqa: S311  spreads those who wait
        self._retry_s = min(2 * self._retry_s, self._limits.retry_s_max)

    async def _pick(self) -> Pair:
        """A pair, waited for where workers are being brought back: a loss of the only one fails nobody."""
        pair = await self._fleet.choose_within(self._limits.recovery_s, self._avoid, self._epoch)
        if pair is not None:
            return pair
        if self._epoch is not None and self._fleet.epochs():
            raise _epoch_gone(self._epoch)
        raise NotReady("no pair of prefill and decode workers is ready. Retry in a few seconds")

    async def _attempt(self, pair: Pair, attempt: int) -> None:
        request = self._request(attempt)
        handoff = await self._prefill(pair.prefill, request, pair.epoch)
        if handoff is not None:
            await self._decode(pair.decode, handoff)
            self._holders.clear()

    def _request(self, attempt: int) -> GenerationRequest:
        """Raises DeadlinePassed for one that is too late to begin."""
        accepted = tuple(self._stream.accepted)
        job = self._job
        return GenerationRequest(
            job.request_id,
            attempt,
            job.prompt_ids,
            job.sampling,
            accepted,
            job.tenant,
            priority=job.priority,
            deadline_s=self._left_s(),
        )

    def _left_s(self) -> float | None:
        """Until the deadline. None: it has none, or has met it."""
        if self._job.deadline_s is None or self._stream.accepted:
            return None
        left_s = self._job.deadline_s - (self._clock.now() - self._began)
        if left_s <= 0:
            raise DeadlinePassed(
                f"no worker had a first token within deadline_s of {self._job.deadline_s} s: allow more, or "
                "give the request a lower priority number",
                param="deadline_s",
            )
        return left_s

    def _announce_once(self, worker: PrefillHandle) -> None:
        """It has to wait: the store may bring up meanwhile what it has of the prompt."""
        if not self._announced:
            self._announced = True
            self._announce(worker, self._request(0))

    async def _prefill(
        self, member: Member[PrefillHandle], request: GenerationRequest, epoch: Epoch
    ) -> Handoff | None:
        """The first token is streamed before the handoff is asked for. None: it was also the last."""
        self._now_at(member, request.attempt)
        with member.carrying(len(request.prompt_ids) + len(request.output_ids)):
            first = await self._bounded("prefill", member.handle.prefill(request), self._limits.prefill_s)
            epoch = first.epoch or epoch
            if self._epoch is not None and not self._fleet.transitions.leads(self._epoch, epoch):
                raise _epoch_gone(self._epoch)
            self._take_first(first)
            self._epoch = epoch
            self.stats = self.stats or first.stats
            if self._stream.finished:
                return None
            handing = member.handle.handoff(request.request_id, request.attempt)
            handoff = await self._bounded("handoff", handing, self._limits.call_s)
        if handoff is None:
            raise WorkerFailed(f"prefill worker {member.facts.worker_id} has nothing to hand off")
        return handoff

    def _take_first(self, first: FirstToken) -> None:
        drop = self._stream.offer(first.event)
        if drop is not None:
            self._dropped[drop] += 1
        self._stream.check()
        if drop is not None:
            raise WorkerFailed(f"prefill worker {self._at} answered with a token nobody expects ({drop})")

    async def _decode(self, member: Member[DecodeHandle], handoff: Handoff) -> None:
        self._now_at(member, handoff.request.attempt)
        pump = self._pumps.get(member.facts.worker_id)
        if pump is None:
            raise WorkerGone(f"decode worker {member.facts.worker_id} left before it was asked")
        pump.attach(self._stream)
        try:
            with member.carrying(handoff.next_position):
                await self._bounded("start", member.handle.start(handoff), self._limits.call_s)
                await self._stream.attempt_over(self._limits.prefill_s, self._limits.stall_s)
        finally:
            pump.detach(self._stream)

    def _now_at(self, member: Member[PrefillHandle] | Member[DecodeHandle], attempt: int) -> None:
        """If the attempt fails now, it is this worker's doing; and it may hold something of the job."""
        self._at = member.facts.worker_id
        self._holders.append((member.facts.worker_id, member.handle, attempt))

    async def _bounded(self, what: str, call: Awaitable[T], limit_s: float) -> T:
        """A worker's answer. What it raises is a WorkerError, but for what every worker would say."""
        try:
            async with asyncio.timeout(limit_s):
                return await call
        except TimeoutError:
            raise WorkerSlow(f"{what} on worker {self._at} took more than {limit_s:.0f} s") from None
        except WorkerError:
            raise
        except KVStrataError as error:
            if error.status == "INVALID_ARGUMENT":
                raise BadRequest(str(error)) from error
            if error.status == "DEADLINE_EXCEEDED":
                self._left_s()  # its own deadline is no worker's fault
            raise refused(f"{what} on worker {self._at}: {error}", error.status) from error
        except Exception as error:
            raise WorkerFailed(f"{what} on worker {self._at}: {type(error).__name__}: {error}") from error


def _epoch_gone(epoch: Epoch) -> GenerationFailed:
    return GenerationFailed(
        f"the answer began under epoch {epoch.number} and no worker of those weights is left to go on with "
        "it. Send the request again: it will run under the new weights",
        code="epoch_gone",
    )
