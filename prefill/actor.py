"""The prefill role as a Ray actor: loads its model on the first `ready`, then passes every call on.

KV never travels through actor calls but for a handoff's tail (less than one block).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.actor import WorkerActor, as_actor
from engine.types import FirstToken, GenerationRequest, Handoff

if TYPE_CHECKING:
    from prefill.role import PrefillRole

__all__ = ["PrefillWorker", "PrefillWorkerActor"]


class PrefillWorker(WorkerActor["PrefillRole"]):
    """Async: Ray runs its methods on one event loop, the role's own. Methods raise what the role's raise."""

    async def _make_role(self) -> PrefillRole:
        # Here, not above: torch comes with them, and whoever starts the actor needs none of it.
        from engine.boot import boot
        from prefill.role import PrefillRole

        return PrefillRole(await boot(self._config, node_id=self._node_id))

    async def prefill(self, request: GenerationRequest) -> FirstToken:
        return await (await self._role()).prefill(request)

    async def announce(self, request: GenerationRequest) -> None:
        await (await self._role()).announce(request)

    async def handoff(self, request_id: str, attempt: int) -> Handoff | None:
        return await (await self._role()).handoff(request_id, attempt)


PrefillWorkerActor = as_actor(PrefillWorker)
