"""Other weights for a running worker: loaded beside the old ones, then changed between two steps.

    prepare   load, check, pack (beside, in a thread) -> is the number free, in the pool and in the store?
    bind      the number to these weights, in the pool and in the store -> open sessions of it
    change    [no step, no admission runs] engine's model | store's epoch | pool's epoch | what runs: one turn

What `prepare` does leaves no trace but memory: a number that was prepared, then discarded or refused, may be
given to other weights. Binding is for ever, and `update` does it last. If it fails behind that (what runs
does not end in time; one shard of several conflicts), the old weights stay, and the number stays bound where
it was by then: the same weights may be asked for under it again, others may not.

What runs obeys the mode; requests that are not in the engine yet begin again under the new weights, whatever
the mode. Nothing that was computed, or read, under one epoch can be kept or published under another:
publications and sessions have the epoch of their making, and the pool's cache takes nothing from a sequence
that began under another (engine/local_run.py).

Memory: from `prepare` until the change both models' matrices are held (and until `discard` if it never
comes); the pool is held once. The change itself takes a step's rest and some microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog
import torch

from engine.models.config import ModelConfig
from engine.models.llama import LlamaModel
from engine.parallel.session import Session
from engine.registry import resolve_model
from engine.tokenizer import Tokenizer
from engine.types import UpdateMode
from engine.weights import DTYPES, load_weights
from kvstore.errors import ConfigError, DeadlineExceeded, EpochConflict, KVStrataError, Unavailable
from kvstore.nouns import Epoch, WeightsDigest

if TYPE_CHECKING:
    from engine.boot import Worker
    from engine.engine import Engine
    from engine.engine_thread import EngineThread

__all__ = ["BEGINNINGS_MAX", "ChangingRole", "LoadedWeights", "WeightsUpdate", "load_beside"]

BEGINNINGS_MAX: Final = 8
"""How often one request begins because the weights changed under it, before its caller is to ask again."""
_CONTINUED_MAX: Final = 64
_MAY_DIFFER: Final = frozenset(
    {"rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "eos_token_ids", "bos_token_id"}
)
"""Of config.json: what changes neither a tensor's shape nor the pool. The digest covers what decides KV."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """A model ready to take an engine's next step."""

    model_config: ModelConfig
    model: LlamaModel
    digest: WeightsDigest


def load_beside(engine: Engine, folder: Path) -> LoadedWeights:
    """The weights of `folder` for an engine that goes on meanwhile; it is not touched. From any thread.

    Batch invariance is proved for its products: which of them computes a row may depend on the weights.
    Raises ModelError's kinds, ConfigError where architecture, layout or tokenizer are not the engine's.
    """
    config = ModelConfig.from_folder(folder)
    _check_same_shape(engine.model_config, config, folder)
    if config.max_position_embeddings < engine.max_model_len:
        raise ConfigError(
            f"{folder} was made for {config.max_position_embeddings} tokens, this engine serves "
            f"{engine.max_model_len}: start it with a smaller engine.max_model_len"
        )
    if Tokenizer.from_folder(folder).digest != engine.tokenizer.digest:
        raise ConfigError(
            f"{folder} has another tokenizer or chat template than the weights that run: the same ids would "
            "mean other text. Start a service of its own for it"
        )
    torch.set_num_threads(
        engine.config.compute_threads
    )  # also of this thread: what is proved here runs there
    weights = load_weights(folder, config, DTYPES[engine.config.dtype])
    return LoadedWeights(config, engine.model_beside(config, weights), weights.digest)


def _check_same_shape(old: ModelConfig, new: ModelConfig, folder: Path) -> None:
    names = [field.name for field in fields(ModelConfig) if field.name not in _MAY_DIFFER]
    other = [name for name in names if getattr(old, name) != getattr(new, name)]
    if other:
        told = ", ".join(f"{name} {getattr(new, name)} (runs: {getattr(old, name)})" for name in other)
        raise ConfigError(
            f"{folder} is a model of another shape: {told}. Only weights of the same architecture and layout "
            "can be changed under a running engine: start new workers for it"
        )


class ChangingRole(Protocol):
    """The role over a worker whose weights change. All on the event loop."""

    left: asyncio.Event
    """Set whenever a request leaves."""

    @property
    def idle(self) -> bool:
        """Nothing runs or is parked here that began under the weights of now."""
        ...

    def hold_back(self, on: bool) -> None:
        """Let nothing new begin, or again."""
        ...

    def weights_changed(self, mode: UpdateMode, epoch: Epoch) -> None:
        """In the turn in which they change: see to it that what runs obeys the mode. Must not raise."""
        ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    path: str
    epoch: Epoch
    loaded: LoadedWeights


class WeightsUpdate:
    """One worker's, on its event loop; one update at a time, another is refused."""

    def __init__(self, engine: Engine, thread: EngineThread) -> None:
        self.continued: list[Epoch] = []
        """Epochs whose sequences may go on here under the weights of now: changed by keep or recompute."""
        self._engine = engine
        self._thread = thread
        self._busy = False
        self._prepared: _Prepared | None = None
        self._discarded = 0  # how often

    async def prepare(self, worker: Worker, path: str, number: int) -> Epoch:
        """Load beside, so that `update` with the same arguments only binds and changes. Idempotent; binds
        nothing.

        Raises ModelError's kinds and ConfigError as `load_beside`, ConfigError for an epoch of the past,
        EpochConflict for a number that stands for other weights here or on a shard that answers, OverLimit
        where the pool knows no more epochs, Unavailable while an update is under way. Discarded while it
        loads, it ends as ever and holds nothing.
        """
        with self._alone():
            return (await self._prepare(worker, path, number)).epoch

    def discard(self) -> None:
        """Forget what was prepared, and free its memory; also what is being prepared now, when it is loaded.
        An update under way has what it needs, and goes on."""
        self._prepared = None
        self._discarded += 1

    async def update(
        self,
        worker: Worker,
        role: ChangingRole,
        path: str,
        number: int,
        mode: UpdateMode,
        timeout_s: float,
    ) -> Epoch:
        """Prepare, if that was not done, then change. Raises what `prepare` raises, DeadlineExceeded when
        what runs does not end in time (drain); then the old weights stay, and the number may be bound to the
        new ones. Nothing to do, if this worker has this epoch already."""
        updating = _outcome(self._update(worker, role, path, number, mode, timeout_s))
        # Not to end halfway with its caller: the worker would be of two epochs.
        outcome = await asyncio.shield(worker.background.spawn(updating, "update weights"))
        if isinstance(outcome, KVStrataError):
            raise outcome
        return outcome

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._busy:
            raise Unavailable("the weights are being changed already: wait for that to end, then ask again")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    async def _prepare(self, worker: Worker, path: str, number: int) -> _Prepared:
        """It stands in `_prepared`, too, unless it was discarded meanwhile or is what runs."""
        now, ready = worker.store.epoch, self._prepared
        if ready is not None and (ready.path, ready.epoch.number) == (path, number):
            return ready
        self._prepared, discarded = None, self._discarded
        if number < now.number:
            raise ConfigError(
                f"this worker is at epoch {now.number}, and epochs never go back: give the weights a number "
                f"above {now.number}, also where they ran before"
            )
        folder = await asyncio.to_thread(resolve_model, path)
        loaded = await asyncio.to_thread(load_beside, self._engine, folder)
        epoch = Epoch(number, loaded.digest)
        prepared = _Prepared(path, epoch, loaded)
        if number == now.number:
            if epoch != now:
                raise EpochConflict(
                    f"epoch {number} stands for weights {now.weights_digest.hex()}, {path} has "
                    f"{loaded.digest.hex()}: take the next number for new weights"
                )
            return prepared
        if worker.edge is not None:
            worker.edge.check_epoch(epoch)
        await worker.store.check_epoch(epoch)
        if discarded == self._discarded:
            self._prepared = prepared
        return prepared

    async def _bind(self, worker: Worker, epoch: Epoch) -> dict[str, Session]:
        """The number to its weights, for ever: nothing but waiting lies between this and the change."""
        sessions = await worker.store.sessions_of(epoch)
        if worker.edge is not None:
            worker.edge.know(epoch)
        return sessions

    async def _update(
        self,
        worker: Worker,
        role: ChangingRole,
        path: str,
        number: int,
        mode: UpdateMode,
        timeout_s: float,
    ) -> Epoch:
        with self._alone():
            prepared = await self._prepare(worker, path, number)
            epoch = prepared.epoch
            if epoch == worker.store.epoch:
                return epoch
            sessions = await self._bind(worker, epoch)
            drains = mode is UpdateMode.DRAIN
            role.hold_back(drains)
            try:
                async with await _between_steps(worker, role, drains, timeout_s):
                    await self._switch(worker, role, mode, prepared, sessions)
            finally:
                role.hold_back(False)
            return epoch

    async def _switch(
        self,
        worker: Worker,
        role: ChangingRole,
        mode: UpdateMode,
        prepared: _Prepared,
        sessions: dict[str, Session],
    ) -> None:
        """No step and no admission runs. Behind the engine's own change there is no wait: one turn."""
        old = worker.store.epoch
        await self._thread.submit(self._engine.swap_weights, prepared.loaded)
        epoch, self._prepared = prepared.epoch, None
        worker.store.change_epoch(epoch, sessions)
        if worker.edge is not None:
            worker.edge.change_epoch(epoch)
        worker.info = replace(worker.info, weights_digest=epoch.weights_digest, epoch_number=epoch.number)
        goes_on = mode in (UpdateMode.KEEP, UpdateMode.RECOMPUTE)
        self.continued = [*self.continued, old][-_CONTINUED_MAX:] if goes_on else []
        worker.loop.weights_changed()
        role.weights_changed(mode, epoch)
        worker.role_counters["weights:updates"] += 1
        log.info("weights changed", worker=worker.info.worker_id, epoch=epoch.number, mode=mode.value)


async def _between_steps(
    worker: Worker, role: ChangingRole, drains: bool, timeout_s: float
) -> contextlib.AsyncExitStack:
    """Entered: no step and no admission runs, and when it drains nothing is left that could. Raises
    DeadlineExceeded."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                while drains and not role.idle:
                    role.left.clear()
                    await role.left.wait()
                async with contextlib.AsyncExitStack() as pausing:
                    await pausing.enter_async_context(worker.loop.gate.held())
                    if not drains or role.idle:
                        return pausing.pop_all()
    except TimeoutError:
        raise DeadlineExceeded(
            f"what runs on worker {worker.info.worker_id} did not end within {timeout_s:.0f} s: the old "
            "weights stay. Wait longer, or use another mode"
        ) from None


async def _outcome(work: Coroutine[Any, Any, Epoch]) -> Epoch | KVStrataError:
    """A stated error is its caller's to tell; what else goes wrong is the background's."""
    try:
        return await work
    except KVStrataError as error:
        return error
