"""How shards and workers come to be: what the supervisor asks for, whoever makes them.

`ray_launcher.RayLauncher` makes Ray actors; tests make objects in the same process.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from engine.types import UpdateMode, WorkerInfo
from kvstore.nouns import Epoch, ShardId
from kvstore.topology import Topology
from kvstore.transport.base import ShardStatus
from router.handles import DecodeHandle, PrefillHandle, WorkerFacts

__all__ = ["Kind", "LaunchedShard", "LaunchedWorker", "Launcher", "Process"]


class Kind(enum.Enum):
    SHARD = "shard"
    PREFILL = "prefill"
    DECODE = "decode"


class Process(Protocol):
    """One actor's life, whatever it does."""

    async def set_topology(self, topology: Topology) -> None: ...

    async def drain(self, timeout_s: float) -> None:
        """Finish what runs within the bound."""
        ...

    def kill(self) -> None:
        """End it at once. Idempotent; never waits."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchedShard:
    process: ShardProcess
    address: str
    pid: int
    admin: str = ""  # where it takes admins' calls


@dataclass(frozen=True, slots=True)
class LaunchedWorker:
    process: WorkerProcess
    facts: WorkerFacts
    handle: PrefillHandle | DecodeHandle


class ShardProcess(Process, Protocol):
    async def status(self) -> ShardStatus: ...

    async def flip_stored_byte(self) -> str | None: ...

    async def advance_epoch(self, model_id: str, epoch: Epoch) -> None:
        """Register it, if it is not, and make it the model's current one; older KV is worth nothing to it."""
        ...


class WorkerProcess(Process, Protocol):
    async def counters(self) -> Mapping[str, float]: ...

    async def forget_local(self) -> int: ...

    async def prepare_weights(self, path: str, number: int) -> Epoch: ...

    async def discard_weights(self) -> None: ...

    async def update_weights(
        self, path: str, number: int, mode: UpdateMode, timeout_s: float
    ) -> WorkerInfo: ...


class Launcher(Protocol):
    """Both raise what went wrong (and leave no process behind), or WorkerGone when it died meanwhile. Neither
    bounds its own time: a caller that gives up cancels, which ends the process too."""

    async def shard(self, shard: ShardId) -> LaunchedShard: ...

    async def worker(self, kind: Kind, worker_id: str) -> LaunchedWorker: ...

    def serve_weights(self, path: str, number: int) -> None:
        """What workers load from now on, and the number of its epoch."""
        ...
