"""The decode role: handoffs in, tokens out, and the blocks they fill into the store for the next turn.

    start(handoff)   accept, then in the background: read blocks -> admit -> give the leases back -> steps ...
    poll(cursor)     the tokens of all sequences since the cursor, as they come

Once `start` is called the handoff's leases are this role's, however it ends. An accepted handoff that cannot
go on says so in its last event (finish ERROR); the others go on. Who owns what: docs/design.md section 9.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import structlog

from decode.events import EventLog
from decode.onboarding import check_handoff, onboard_and_admit
from decode.sequence import Decoding
from engine.aborted import AbortedAttempts
from engine.boot import Worker
from engine.types import FinishReason, Handoff, PollResult, TokenEvent, UpdateMode, WorkerInfo
from kvstore.errors import EpochConflict, OverLimit, Unavailable
from kvstore.nouns import BlockKey, Epoch
from kvstore.topology import ShardEntry, Topology

__all__ = ["DecodeRole"]

log = structlog.get_logger("decode")


class DecodeRole:
    """One worker's. Every method is bounded; at most `requests_max` sequences are held at one time."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._limits = worker.limits
        self._counters = worker.role_counters
        self._live: dict[str, Decoding] = {}  # the newest attempt of each request
        self._events = EventLog(worker.limits.events_max)
        self._aborted = AbortedAttempts(worker.clock)
        self._draining = False
        self._at_the_gate = 0  # starts that wait for a change of the weights to be over
        self.left = asyncio.Event()  # set whenever a sequence leaves

    async def ready(self) -> WorkerInfo:
        return self._worker.info

    async def start(self, handoff: Handoff) -> None:
        """Take the handoff over; its tokens come by `poll`. Returns when it is accepted.

        A start of a superseded or aborted attempt, or a repeated one, is accepted and does nothing. Raises
        OverLimit when the worker is full, Unavailable when it drains, EpochConflict for other weights. Waits
        while the weights are being changed: a step's rest and the change.
        """
        run = Decoding(handoff, self._told)
        if self._is_here(run):
            return  # told once more: its leases are in use
        try:
            await self._come_in()
            if self._is_here(run):
                return
            self._check_can_take(handoff)
        except BaseException:
            self._give_back_leases(run)
            raise
        live = self._live.get(run.request_id)
        superseded = live is not None and live.attempt > run.attempt
        if superseded or self._aborted.covers(run.request_id, run.attempt):
            self._give_back_leases(run)
            return
        if live is not None:
            self._counters["decode:superseded"] += 1
            self._end(live)
            self._events.forget(run.request_id, run.attempt)
        self._live[run.request_id] = run
        self._counters["decode:requests"] += 1
        run.task = self._worker.background.spawn(self._begin(run), f"start {run.request_id}")

    async def poll(self, cursor: int, timeout_s: float) -> PollResult:
        """Events since `cursor` (0: from the oldest kept), waiting up to `timeout_s` for the first."""
        polled = await self._events.wait(cursor, min(timeout_s, self._limits.poll_timeout_s_max))
        return replace(polled, preempted=self._worker.loop.preempted)

    async def abort(self, request_id: str, attempt: int) -> None:
        """Stop and free what this attempt, or an earlier one, holds, also what is on its way here. No event
        says so. Idempotent."""
        self._aborted.remember(request_id, attempt)
        run = self._live.get(request_id)
        if run is not None and run.attempt <= attempt:
            self._counters["decode:aborted"] += 1
            self._end(run)

    async def counters(self) -> dict[str, float]:
        own = {"decode:events_dropped": float(self._events.dropped), "gauge:requests": float(len(self._live))}
        return self._worker.counters() | own

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
        """Change the weights under what runs. See `engine.updating.WeightsUpdate.update`. While it drains,
        handoffs of the old epoch are taken: they began elsewhere, and end with the old weights."""
        await self._worker.weights.update(self._worker, self, path, number, mode, timeout_s)
        return self._worker.info

    async def drain(self, timeout_s: float) -> bool:
        """Take no more work; wait for what runs. False: time was up, and what was left ended in an error."""
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
        for run in [*self._live.values()]:
            run.on_error(Unavailable(f"worker {self._worker.info.worker_id} was drained: resume elsewhere"))
        await self._worker.background.settle(self._limits.publish_timeout_s)
        return finished

    async def close(self) -> None:
        """End everything at once. For work to finish first, drain."""
        self._draining = True
        for run in [*self._live.values()]:
            self._end(run)
        await self._worker.close()

    # -- other weights -----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self._live

    def hold_back(self, on: bool) -> None:
        """Nothing is, until they are being changed (`_come_in`): what comes here began before."""

    def weights_changed(self, mode: UpdateMode, epoch: Epoch) -> None:
        """Who is not in the engine yet is computed from its tokens (abort: ends, as all do)."""
        loop = self._worker.loop
        for run in [*self._live.values()]:
            if mode is UpdateMode.ABORT:
                why = EpochConflict(f"the weights changed to epoch {epoch.number}: send the request again")
                run.on_error(why, FinishReason.ABORT)
            elif not loop.holds(run.request_id, run.attempt):
                continue
            elif mode is UpdateMode.KEEP and loop.holds(run.request_id, run.attempt, running=True):
                run.keep_over(epoch)
            else:  # also where it has no KV now that it could keep
                loop.release(run.request_id, run.attempt)
                run.task = self._worker.background.spawn(self._begin(run), f"begin {run.request_id} again")

    # -- inside ------------------------------------------------------------------------------------

    def _is_here(self, run: Decoding) -> bool:
        live = self._live.get(run.request_id)
        return live is not None and live.attempt == run.attempt

    async def _come_in(self) -> None:
        """While the engine is held for a change nobody comes in: what did would begin under the old weights
        and be computed under the new ones, which only keep and recompute allow. Raises OverLimit."""
        gate = self._worker.loop.gate
        if gate.is_open:
            return
        if self._at_the_gate >= self._limits.requests_max:
            raise OverLimit(
                f"{self._at_the_gate} handoffs wait here for other weights: ask another, or later"
            )
        self._at_the_gate += 1
        try:
            await gate.opened()
        finally:
            self._at_the_gate -= 1

    def _check_can_take(self, handoff: Handoff) -> None:
        if self._draining:
            raise Unavailable(f"worker {self._worker.info.worker_id} is draining: ask another")
        if len(self._live) >= self._limits.requests_max:
            raise OverLimit(f"this worker holds {len(self._live)} sequences already: ask another, or later")
        check_handoff(self._worker, handoff)

    async def _begin(self, run: Decoding) -> None:
        """Onboard and admit. Whatever fails here is the last event of this sequence, and of no other."""
        try:
            await onboard_and_admit(self._worker, run)
        except Exception as error:
            run.log.warning("the sequence could not go on", error=str(error))
            run.on_error(error)
        finally:
            self._give_back_leases(run)

    def _told(self, run: Decoding, event: TokenEvent) -> None:
        if run.ended:
            return
        self._events.append(event)
        if event.finish is not None:
            self._counters[f"decode:finished_{event.finish.value}"] += 1
            run.log.info("decoded", finish=event.finish.value, output_tokens=run.next_index)
            self._end(run)

    def _end(self, run: Decoding) -> None:
        """Free slots and leases. Idempotent; never waits: what it starts ends in the background."""
        if run.ended:
            return
        run.ended = True
        del self._live[run.request_id]
        if run.task is not None and run.task is not asyncio.current_task():
            run.task.cancel()
        self._worker.loop.release(run.request_id, run.attempt)
        if run.local is not None:
            run.local.abandon()
        self._give_back_leases(run)
        self.left.set()

    def _give_back_leases(self, run: Decoding) -> None:
        leases, run.leases = run.leases, ()
        self._worker.store.release_for(run.handoff.request.tenant, leases)
