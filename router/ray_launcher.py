"""Shards and workers as Ray actors. With `ray_actor.py` and `cluster.py`, all that the router knows of Ray.

Nothing here holds a CPU unless the configuration says so: shards and workers share what the machine has.
Actors are owned by the process that makes them and end with it. Ray does not restart them
(`max_restarts=0`): a worker that came back by itself would be one the supervisor has not told anything yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any, Final, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from engine.types import FirstToken, GenerationRequest, Handoff, PollResult, UpdateMode, WorkerInfo
from engine.worker_config import WorkerConfig
from kvstore.actor import KVShardActor, ShardStart
from kvstore.errors import KVStrataError
from kvstore.nouns import Epoch, ShardId
from kvstore.topology import Topology
from kvstore.transport.base import ShardStatus
from router.config import RoleConfig, ServiceConfig, served_name
from router.errors import WorkerFailed, WorkerGone
from router.handles import WorkerFacts
from router.launcher import Kind, LaunchedShard, LaunchedWorker

__all__ = ["RayLauncher"]

T = TypeVar("T")
_NO_TOPOLOGY: Final = Topology(0, ())
"""What a worker starts with: it loads its model while the shards come up, and is told of them after."""


class RayLauncher:
    """`model` is what workers load: a folder when all run on this machine, else the name they look up."""

    def __init__(self, config: ServiceConfig, model: str, cluster_secret: bytes, token: str) -> None:
        self._config = config
        self._model = model
        self._cluster_secret = cluster_secret
        self._token = token
        self._epoch_number = config.epoch

    def serve_weights(self, path: str, number: int) -> None:
        self._model, self._epoch_number = path, number

    async def shard(self, shard: ShardId) -> LaunchedShard:
        actor = KVShardActor.options(max_restarts=0, resources=self._config.store.resources).remote()
        process = _RayShard(actor)
        try:
            start = ShardStart(shard, self._config.store, self._cluster_secret, self._token)
            address = await _answer(actor.start.remote(start))
            pid, admin = actor.pid.remote(), actor.admin_address.remote()
            return LaunchedShard(process, address, await _answer(pid), await _answer(admin))
        except BaseException:
            process.kill()
            raise

    async def worker(self, kind: Kind, worker_id: str) -> LaunchedWorker:
        role = self._config.prefill if kind is Kind.PREFILL else self._config.decode
        actor = _actor_class(kind).options(**_placement(role)).remote(self._worker_config(role, worker_id))
        handle = _RayPrefill(actor) if kind is Kind.PREFILL else _RayDecode(actor)
        try:
            info: WorkerInfo = await _answer(actor.ready.remote())
            return LaunchedWorker(handle, _facts(info), handle)
        except BaseException:
            handle.kill()
            raise

    def _worker_config(self, role: RoleConfig, worker_id: str) -> WorkerConfig:
        return WorkerConfig(
            worker_id=worker_id,
            model=self._model,
            model_id=served_name(self._config),
            engine=self._config.engine,
            topology=_NO_TOPOLOGY,
            token=self._token,
            store_tls=self._config.store.client_tls(),
            epoch_number=self._epoch_number,
            min_quality=self._config.store.min_quality,
            limits=role.limits,
        )


def _actor_class(kind: Kind) -> Any:
    """Imported when it is first needed, beside the event loop's other work."""
    if kind is Kind.PREFILL:
        from prefill.actor import PrefillWorkerActor

        return PrefillWorkerActor
    from decode.actor import DecodeWorkerActor

    return DecodeWorkerActor


def _placement(role: RoleConfig) -> dict[str, Any]:
    return {
        "max_restarts": 0,
        "num_cpus": role.num_cpus,
        "num_gpus": role.num_gpus,
        "resources": role.resources,
        "scheduling_strategy": "SPREAD",
    }


def _facts(info: WorkerInfo) -> WorkerFacts:
    epoch = Epoch(info.epoch_number, info.weights_digest)
    return WorkerFacts(info.worker_id, epoch, info.max_model_len, info.pid, info.node_id)


class _RayActor:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def set_topology(self, topology: Topology) -> None:
        await _answer(self._actor.set_topology.remote(topology))

    async def drain(self, timeout_s: float) -> None:
        await _answer(self._actor.drain.remote(timeout_s))

    def kill(self) -> None:
        # Raised when Ray itself is gone, and the actor with it.
        try:
            ray.kill(self._actor)
        except (RayError, ValueError, RuntimeError):
            return


class _RayShard(_RayActor):
    async def status(self) -> ShardStatus:
        status: ShardStatus = await _answer(self._actor.status.remote())
        return status

    async def flip_stored_byte(self) -> str | None:
        key: str | None = await _answer(self._actor.flip_stored_byte.remote())
        return key

    async def advance_epoch(self, model_id: str, epoch: Epoch) -> None:
        await _answer(self._actor.advance_epoch.remote(model_id, epoch))


class _RayWorker(_RayActor):
    async def abort(self, request_id: str, attempt: int) -> None:
        await _answer(self._actor.abort.remote(request_id, attempt))

    async def counters(self) -> Mapping[str, float]:
        counters: dict[str, float] = await _answer(self._actor.counters.remote())
        return counters

    async def forget_local(self) -> int:
        blocks: int = await _answer(self._actor.forget_local.remote())
        return blocks

    async def prepare_weights(self, path: str, number: int) -> Epoch:
        epoch: Epoch = await _answer(self._actor.prepare_weights.remote(path, number))
        return epoch

    async def discard_weights(self) -> None:
        await _answer(self._actor.discard_weights.remote())

    async def update_weights(self, path: str, number: int, mode: UpdateMode, timeout_s: float) -> WorkerInfo:
        info: WorkerInfo = await _answer(self._actor.update_weights.remote(path, number, mode, timeout_s))
        return info


class _RayPrefill(_RayWorker):
    async def prefill(self, request: GenerationRequest) -> FirstToken:
        first: FirstToken = await _answer(self._actor.prefill.remote(request))
        return first

    async def announce(self, request: GenerationRequest) -> None:
        await _answer(self._actor.announce.remote(request))

    async def handoff(self, request_id: str, attempt: int) -> Handoff | None:
        handoff: Handoff | None = await _answer(self._actor.handoff.remote(request_id, attempt))
        return handoff


class _RayDecode(_RayWorker):
    async def start(self, handoff: Handoff) -> None:
        await _answer(self._actor.start.remote(handoff))

    async def poll(self, cursor: int, timeout_s: float) -> PollResult:
        polled: PollResult = await _answer(self._actor.poll.remote(cursor, timeout_s))
        return polled


async def _answer(reference: Awaitable[T]) -> T:
    """An actor's answer, its errors as ours: its own kinds of KVStrataError as they were raised."""
    try:
        return await reference
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, KVStrataError):
            raise cause from None
        if isinstance(cause, asyncio.CancelledError):
            raise WorkerFailed("the call was cancelled on the worker") from None
        raise WorkerFailed(f"{type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise WorkerGone(f"its process is gone ({str(error).splitlines()[0]})") from None
    except RayError as error:
        raise WorkerGone(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
