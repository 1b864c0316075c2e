"""The prefill role: a prompt in, the first token out as soon as it is drawn, then what decode goes on from.

    prefill(request)   match -> read -> admit(hold) -> steps ... -> first token    [blocks publish meanwhile]
    handoff(id)        wait for the publications -> Handoff -> the engine's slots are free

Between the two the sequence is parked: computed, holding its slots, waiting to be fetched, and dropped after
`parked_s`. Whatever ends a request early (abort, a newer attempt, a cancelled call, an error) ends in `_end`,
which frees its slots and leases without waiting. Who owns what, and when: docs/design.md section 9.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import structlog

from engine.aborted import AbortedAttempts
from engine.boot import Worker
from engine.errors import RequestAborted, WeightsChanged
from engine.types import FirstToken, GenerationRequest, Handoff, UpdateMode, WorkerInfo
from kvstore.errors import NotFound, OverLimit, Unavailable
from kvstore.lineage import Lineage
from kvstore.nouns import BlockKey, Epoch
from kvstore.topology import ShardEntry, Topology
from prefill.computing import assemble_handoff, compute_first_token
from prefill.sequence import Prefilling

__all__ = ["PrefillRole"]

T = TypeVar("T")

log = structlog.get_logger("prefill")


class PrefillRole:
    """One worker's. Every method is bounded; at most `requests_max` requests are held at one time."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._limits = worker.limits
        self._counters = worker.role_counters
        self._live: dict[str, Prefilling] = {}  # the newest attempt of each request
        self._aborted = AbortedAttempts(worker.clock)
        self._draining = False
        self.left = asyncio.Event()  # set whenever a request leaves
        self._door = asyncio.Event()  # clear while requests are held back for other weights
        self._door.set()
        self._at_the_door = 0
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="sweep parked prompts")

    async def ready(self) -> WorkerInfo:
        return self._worker.info

    async def prefill(self, request: GenerationRequest) -> FirstToken:
        """Onboard what the store has, compute the rest, draw one token.

        Raises RequestAborted, OverLimit when the worker is full, Unavailable when it drains, ConfigError for
        a request that never fits, and what the engine raises. Nothing is held then.
        """
        await self._come_in(request)
        run = self._enlist(request)
        first = await self._guarded(run, compute_first_token(self._worker, run))
        run.first, run.parked_at = first, self._worker.clock.now()
        run.log.info(
            "prefilled", prompt_tokens=first.stats.prompt_tokens, cached_tokens=first.stats.cached_tokens
        )
        return first

    async def handoff(self, request_id: str, attempt: int) -> Handoff | None:
        """What decode goes on from; its leases are the caller's from here on. None: the first token was the
        last. Raises NotFound when there is no such parked sequence (any more)."""
        run = self._live.get(request_id)
        if run is None or run.request.attempt != attempt or run.first is None or run.fetching:
            raise NotFound(
                f"attempt {attempt} of request {request_id} is not parked on worker "
                f"{self._worker.info.worker_id} (fetched, aborted or expired): prefill it again"
            )
        run.fetching = True
        handoff = await self._guarded(run, assemble_handoff(self._worker, run, run.first))
        if handoff is not None:
            run.leases = ()  # the caller owns them: no wait lies between here and the return
        self._end(run)
        return handoff

    async def announce(self, request: GenerationRequest) -> None:
        """The prompt will come, here or elsewhere: the store may bring it up. Never waits, never fails."""
        if not self._draining:
            self._worker.announcer.announce_request(request)

    async def abort(self, request_id: str, attempt: int) -> None:
        """Stop and free what this attempt, or an earlier one, holds, or will when it comes. Idempotent."""
        self._aborted.remember(request_id, attempt)
        run = self._live.get(request_id)
        if run is not None and run.request.attempt <= attempt:
            self._counters["prefill:aborted"] += 1
            self._end(run)

    async def counters(self) -> dict[str, float]:
        parked = sum(run.first is not None for run in self._live.values())
        gauges = {"gauge:requests": float(len(self._live)), "gauge:parked": float(parked)}
        return self._worker.counters() | gauges

    async def set_topology(self, topology: Topology) -> None:
        await self._worker.store.set_topology(topology)

    async def pull(self, tenant: str, keys: Sequence[BlockKey], source: ShardEntry, timeout_s: float) -> int:
        return await self._worker.pull(tenant, keys, source, timeout_s)

    async def forget_local(self) -> int:
        return await self._worker.forget_local()

    async def prepare_weights(self, path: str, number: int) -> Epoch:
        """Load other weights beside those that run. See `engine.updating.WeightsUpdate.prepare`."""
        return await self._worker.weights.prepare(self._worker, path, number)

    async def discard_weights(self) -> None:
        """They are not needed after all."""
        self._worker.weights.discard()

    async def update_weights(self, path: str, number: int, mode: UpdateMode, timeout_s: float) -> WorkerInfo:
        """Change the weights under what runs. What was prefilled and not fetched yet stays as it is, a whole
        handoff of its epoch (abort: it ends). See `engine.updating.WeightsUpdate.update`."""
        await self._worker.weights.update(self._worker, self, path, number, mode, timeout_s)
        return self._worker.info

    async def drain(self, timeout_s: float) -> bool:
        """Take no more work; wait for what runs or is parked. False: time was up, and the rest was ended."""
        self._draining = True
        finished = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._live:
                    self.left.clear()
                    await self.left.wait()
        except TimeoutError:
            finished = False
            log.warning("drain ends what is left", requests=len(self._live))
        self._end_all()
        await self._worker.background.settle(self._limits.publish_timeout_s)
        return finished

    async def close(self) -> None:
        """End everything at once. For work to finish first, drain."""
        self._draining = True
        self._sweeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sweeper
        self._end_all()
        await self._worker.close()

    def sweep(self) -> int:
        """Drop what has been parked for `parked_s` or longer; how many."""
        now, limit_s = self._worker.clock.now(), self._limits.parked_s
        expired = [run for run in self._live.values() if run.parked_since(now) >= limit_s]
        for run in expired:
            run.log.warning("nobody fetched the prefilled sequence", parked_s=limit_s)
            self._counters["prefill:expired"] += 1
            self._end(run)
        return len(expired)

    # -- other weights -----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self._live

    def hold_back(self, on: bool) -> None:
        """New requests wait at the door."""
        if on:
            self._door.clear()
        else:
            self._door.set()

    def weights_changed(self, mode: UpdateMode, epoch: Epoch) -> None:
        """Who is not in the engine yet begins again by itself (WeightsChanged, from the loop)."""
        loop = self._worker.loop
        for run in [*self._live.values()]:
            parked = run.drawn.done()
            if parked and mode is UpdateMode.ABORT:
                self._end(run)
            elif parked or not loop.holds(run.request.request_id, run.request.attempt):
                continue
            elif mode is UpdateMode.ABORT:
                run.on_error(Unavailable(f"{run.name} was ended for other weights: send it again"))
            elif mode is UpdateMode.KEEP and loop.holds(
                run.request.request_id, run.request.attempt, running=True
            ):
                run.keep_over(epoch)
            else:  # also where it has no KV now that it could keep
                run.on_error(WeightsChanged("computed under the old weights"))

    # -- inside ------------------------------------------------------------------------------------

    async def _come_in(self, request: GenerationRequest) -> None:
        """Wait while requests are held back: as long as the update may take. Raises OverLimit."""
        if self._door.is_set():
            return
        if self._at_the_door >= self._limits.requests_max:
            raise OverLimit(
                f"{self._at_the_door} requests wait here for other weights: ask another, or later"
            )
        self._at_the_door += 1
        try:
            while not self._door.is_set():
                await self._door.wait()
        finally:
            self._at_the_door -= 1

    def _enlist(self, request: GenerationRequest) -> Prefilling:
        """Make it the live attempt of its request. Raises before anything is held."""
        if self._draining:
            raise Unavailable(f"worker {self._worker.info.worker_id} is draining: ask another")
        if self._aborted.covers(request.request_id, request.attempt):
            raise RequestAborted(f"attempt {request.attempt} of {request.request_id} was aborted already")
        earlier = self._live.get(request.request_id)
        if earlier is not None:
            if earlier.request.attempt >= request.attempt:
                raise RequestAborted(
                    f"{earlier.name} is here already: attempt {request.attempt} is superseded"
                )
            self._counters["prefill:superseded"] += 1
            self._end(earlier)
        if len(self._live) >= self._limits.requests_max:
            raise OverLimit(f"this worker holds {len(self._live)} requests already: ask another, or later")
        run = Prefilling(request, Lineage(self._worker.store.epoch))
        self._live[request.request_id] = run
        self._counters["prefill:requests"] += 1
        return run

    async def _guarded(self, run: Prefilling, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` as a task that an abort can end; any end of it but success ends the request."""
        run.task = task = asyncio.create_task(work, name=f"prefill {run.request.request_id}")
        try:
            result = await task
        except BaseException as error:
            aborted = run.ended and isinstance(error, asyncio.CancelledError) and not _being_cancelled()
            self._end(run)
            if not aborted:
                raise
        else:
            if not run.ended:
                return result
        raise RequestAborted(f"{run.name} was aborted or superseded: nothing of it is held here")

    def _end(self, run: Prefilling) -> None:
        """Free slots and leases. Idempotent; never waits: what it starts ends in the background."""
        if run.ended:
            return
        run.ended = True
        del self._live[run.request.request_id]
        if run.task is not None:
            run.task.cancel()
        run.drawn.cancel()
        run.let_go(self._worker)
        self.left.set()

    def _end_all(self) -> None:
        for run in [*self._live.values()]:
            self._end(run)

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._limits.sweep_s)
            self.sweep()


def _being_cancelled() -> bool:
    """Is the calling task itself told to stop, whatever else happened to the task it waits for?"""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
