"""One call changes the weights of the whole service: every worker, then the store's epoch.

    prepare   every worker loads them beside the old ones     one that cannot: nothing is changed or bound
    drain     (that mode) nobody new begins, what runs ends   time is up: nothing has changed, anywhere
    change    every worker, between two of its steps          one that cannot is replaced by a new one
    advance   every shard of the store                        one that cannot is named in the answer

Behind `change` there is no way back: who starts from now on starts with the new weights. Between the first
worker's change and the last one's, prefill and decode may differ; a handoff that meets other weights costs a
wait and another attempt. One update at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from engine.types import UpdateMode
from kvstore.clock import Clock
from kvstore.errors import ConfigError, DeadlineExceeded, Unavailable
from kvstore.nouns import Epoch
from router.errors import NotReady
from router.fleet import Fleet
from router.launcher import LaunchedShard, LaunchedWorker
from router.supervisor import Place, Supervisor, within

__all__ = ["FleetUpdate", "WantedWeights"]

_CHANGE_S: Final = 60.0
"""For a worker's change once its weights are loaded and nothing runs that must end first."""
_SHARD_S: Final = 10.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WantedWeights:
    """`path`: a folder, GGUF file or name that every worker finds under it. `timeout_s`: for what runs to end
    (drain)."""

    path: str
    number: int
    mode: UpdateMode
    timeout_s: float


class FleetUpdate:
    """One service's, on its event loop."""

    def __init__(
        self, supervisor: Supervisor, fleet: Fleet, model_id: str, load_s: float, clock: Clock
    ) -> None:
        self._supervisor = supervisor
        self._fleet = fleet
        self._model_id = model_id
        self._load_s = load_s
        self._clock = clock
        self._busy = False

    async def run(self, wanted: WantedWeights) -> dict[str, Any]:
        """What happened, as plain JSON. Raises Unavailable while another runs, NotReady without workers,
        what a worker's `prepare_weights` raises, DeadlineExceeded; then nothing has changed."""
        if self._busy:
            raise Unavailable("an update of the weights is under way: wait for it to end, then ask again")
        self._busy = True
        try:
            began = self._clock.now()
            epoch = await self._prepare(wanted)
            with contextlib.ExitStack() as held:
                if wanted.mode is UpdateMode.DRAIN:
                    held.enter_context(self._fleet.intake.held())
                    await self._drain(wanted)
                changed, replaced = await self._change(wanted, epoch)
            failed = await self._advance(epoch)
            return {
                "epoch": epoch.number,
                "weights_digest": epoch.weights_digest.hex(),
                "mode": wanted.mode.value,
                "changed": changed,
                "replaced": replaced,
                "not_advanced": failed,
                "seconds": round(self._clock.now() - began, 3),
            }
        finally:
            self._busy = False

    async def _prepare(self, wanted: WantedWeights) -> Epoch:
        workers = self._workers()
        if not workers:
            raise NotReady("no worker runs: wait until the service is ready, then ask again")
        loading = [w.process.prepare_weights(wanted.path, wanted.number) for _, w in workers]
        epochs = await asyncio.gather(*(within(one, self._load_s) for one in loading), return_exceptions=True)
        failures = [answer for answer in epochs if isinstance(answer, BaseException)]
        if failures or len({*epochs}) > 1:
            await self._discard()
            if failures:
                raise failures[0]
            raise ConfigError(
                f"the workers find different weights under {wanted.path}: put the same files on every node"
            )
        (epoch,) = {answer for answer in epochs if isinstance(answer, Epoch)}
        return epoch

    async def _drain(self, wanted: WantedWeights) -> None:
        try:
            async with asyncio.timeout(wanted.timeout_s):
                await self._fleet.intake.emptied()
        except TimeoutError:
            await self._discard()
            raise DeadlineExceeded(
                f"what runs did not end within {wanted.timeout_s:.0f} s: the old weights stay. Wait longer, "
                "or use another mode"
            ) from None

    async def _change(self, wanted: WantedWeights, epoch: Epoch) -> tuple[list[str], list[str]]:
        """From here on there is no way back. Who changed, and who is replaced."""
        old = {worker.facts.epoch for _, worker in self._workers()}
        goes_on = wanted.mode in (UpdateMode.KEEP, UpdateMode.RECOMPUTE)
        self._fleet.transitions.over(old, epoch, goes_on=goes_on)
        self._supervisor.serve_weights(wanted.path, epoch)
        workers = self._workers()
        changing = (self._change_one(place, worker, wanted) for place, worker in workers)
        failures = await asyncio.gather(*changing)
        told = list(zip(workers, failures, strict=True))
        changed = [worker.facts.worker_id for (_, worker), why in told if why is None]
        replaced = [worker.facts.worker_id for (_, worker), why in told if why is not None]
        return changed, replaced

    async def _change_one(self, place: Place, worker: LaunchedWorker, wanted: WantedWeights) -> str | None:
        """Why it could not, or None."""
        update = worker.process.update_weights(wanted.path, wanted.number, wanted.mode, _CHANGE_S)
        try:
            info = await within(update, _CHANGE_S + self._load_s)
        except Exception as error:
            why = f"it could not change its weights: {error}"
            log.warning("a worker is replaced", worker=worker.facts.worker_id, why=why)
            await self._supervisor.replace(place, worker, why)
            return why
        epoch = Epoch(info.epoch_number, info.weights_digest)
        facts = replace(worker.facts, epoch=epoch)
        if place.running is worker:
            place.running = replace(worker, facts=facts)
        self._fleet.changed_weights(facts)
        return None

    async def _advance(self, epoch: Epoch) -> dict[str, str]:
        """Every shard that runs; why not, of those that did not. `kvstrata epoch advance` repeats it."""
        failed: dict[str, str] = {}

        async def advance(shard: LaunchedShard, name: str) -> None:
            try:
                await within(shard.process.advance_epoch(self._model_id, epoch), _SHARD_S)
            except Exception as error:
                failed[name] = str(error)

        places = self._supervisor.places
        shards = [(place.running, place.name) for place in places if isinstance(place.running, LaunchedShard)]
        await asyncio.gather(*(advance(*shard) for shard in shards))
        if failed:
            log.warning("shards did not advance", epoch=epoch.number, failed=failed)
        return failed

    async def _discard(self) -> None:
        async def discard(work: Coroutine[Any, Any, None]) -> None:
            with contextlib.suppress(Exception):  # who does not answer is looked after by the supervisor
                await within(work, _SHARD_S)

        await asyncio.gather(*(discard(worker.process.discard_weights()) for _, worker in self._workers()))

    def _workers(self) -> list[tuple[Place, LaunchedWorker]]:
        places = self._supervisor.places
        return [(place, place.running) for place in places if isinstance(place.running, LaunchedWorker)]
