"""What the actors of both roles share: one start, however many callers wait for it, and the common calls.

Needs Ray, which comes with the extra kvstrata[serve]; only the actors of prefill and decode import this.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any, Final, Generic, Protocol, TypeVar

import kvstore.polling  # noqa: F401 - before anything that imports grpc
from engine.process import prepare_process
from engine.types import UpdateMode, WorkerInfo
from engine.worker_config import WorkerConfig
from kvstore.nouns import Epoch
from kvstore.topology import Topology

try:
    import ray
except ImportError as error:
    raise ImportError("a worker as an actor needs Ray: pip install 'kvstrata[serve]'") from error

__all__ = ["Role", "WorkerActor", "as_actor"]

CONCURRENT_CALLS_MAX: Final = 2_000
"""Calls an actor works on at once; most of them wait. The role's own bounds are tighter."""


class Role(Protocol):
    """The calls that both roles answer."""

    async def ready(self) -> WorkerInfo: ...

    async def abort(self, request_id: str, attempt: int) -> None: ...

    async def counters(self) -> dict[str, float]: ...

    async def set_topology(self, topology: Topology) -> None: ...

    async def forget_local(self) -> int: ...

    async def prepare_weights(self, path: str, number: int) -> Epoch: ...

    async def discard_weights(self) -> None: ...

    async def update_weights(
        self, path: str, number: int, mode: UpdateMode, timeout_s: float
    ) -> WorkerInfo: ...

    async def drain(self, timeout_s: float) -> bool: ...

    async def close(self) -> None: ...


R = TypeVar("R", bound=Role)


class WorkerActor(ABC, Generic[R]):
    """A start that failed is not tried again: `ready` raises why, and its supervisor makes a new actor."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._node_id = str(ray.get_runtime_context().get_node_id())
        self._starting: asyncio.Task[R] | None = None

    @abstractmethod
    async def _make_role(self) -> R:
        """Load and start. Called once."""

    async def ready(self) -> WorkerInfo:
        return await (await self._role()).ready()

    async def abort(self, request_id: str, attempt: int) -> None:
        await (await self._role()).abort(request_id, attempt)

    async def counters(self) -> dict[str, float]:
        return await (await self._role()).counters()

    async def set_topology(self, topology: Topology) -> None:
        await (await self._role()).set_topology(topology)

    async def forget_local(self) -> int:
        return await (await self._role()).forget_local()

    async def prepare_weights(self, path: str, number: int) -> Epoch:
        return await (await self._role()).prepare_weights(path, number)

    async def discard_weights(self) -> None:
        await (await self._role()).discard_weights()

    async def update_weights(self, path: str, number: int, mode: UpdateMode, timeout_s: float) -> WorkerInfo:
        return await (await self._role()).update_weights(path, number, mode, timeout_s)

    async def drain(self, timeout_s: float) -> bool:
        """Finish what runs, then end the engine and the store's connections: it may be killed after."""
        role = await self._role()
        finished = await role.drain(timeout_s)
        await role.close()
        return finished

    async def _role(self) -> R:
        if self._starting is None:
            prepare_process(self._config.engine.wait_policy)
            self._starting = asyncio.create_task(self._make_role(), name="start worker")
        return await asyncio.shield(self._starting)


def as_actor(worker: type[WorkerActor[Any]]) -> Any:
    """The class as Ray starts it: `as_actor(C).options(...).remote(config)`."""
    return ray.remote(max_concurrency=CONCURRENT_CALLS_MAX)(worker)
