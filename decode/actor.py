"""The decode role as a Ray actor: loads its model on the first `ready`, then passes every call on."""

from __future__ import annotations

from decode.role import DecodeRole
from engine.actor import WorkerActor, as_actor
from engine.boot import boot
from engine.types import Handoff, PollResult

__all__ = ["DecodeWorker", "DecodeWorkerActor"]


class DecodeWorker(WorkerActor[DecodeRole]):
    """Async: Ray runs its methods on one event loop, the role's own. Methods raise what the role's raise."""

    async def _make_role(self) -> DecodeRole:
        return DecodeRole(await boot(self._config, node_id=self._node_id))

    async def start(self, handoff: Handoff) -> None:
        await (await self._role()).start(handoff)

    async def poll(self, cursor: int, timeout_s: float) -> PollResult:
        """Long poll: one answer carries what all sequences of the worker said since the cursor."""
        return await (await self._role()).poll(cursor, timeout_s)


DecodeWorkerActor = as_actor(DecodeWorker)
