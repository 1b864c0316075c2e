"""The decode role as a Ray actor: loads its model on the first `ready`, then passes every call on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.actor import WorkerActor, as_actor
from engine.types import Handoff, PollResult

if TYPE_CHECKING:
    from decode.role import DecodeRole

__all__ = ["DecodeWorker", "DecodeWorkerActor"]


class DecodeWorker(WorkerActor["DecodeRole"]):
    """Async: Ray runs its methods on one event loop, the role's own. Methods raise what the role's raise."""

    async def _make_role(self) -> DecodeRole:
        # Here, not above: torch comes with them, and whoever starts the actor needs none of it.
        from decode.role import DecodeRole
        from engine.boot import boot

        return DecodeRole(await boot(self._config, node_id=self._node_id))

    async def start(self, handoff: Handoff) -> None:
        await (await self._role()).start(handoff)

    async def poll(self, cursor: int, timeout_s: float) -> PollResult:
        """Long poll: one answer carries what all sequences of the worker said since the cursor."""
        return await (await self._role()).poll(cursor, timeout_s)


DecodeWorkerActor = as_actor(DecodeWorker)
