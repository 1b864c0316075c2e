"""The workers as the router sees them: what it calls, and what it knows of each.

The methods are those of `prefill.role.PrefillRole` and `decode.role.DecodeRole`, so a role in the same
process is a handle as it stands; `ray_launcher.py` adapts actors. No method bounds its own wait: the caller
does, and takes any exception for the end of the attempt. A handle raises WorkerGone when its process is
dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from engine.types import FirstToken, GenerationRequest, Handoff, TokenEvent
from kvstore.nouns import Epoch

__all__ = [
    "DecodeHandle",
    "Polled",
    "PrefillHandle",
    "WorkerFacts",
    "WorkerHandle",
    "abort_within",
    "announce_within",
]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One incarnation of a worker: a restarted one has another `worker_id`."""

    worker_id: str
    epoch: Epoch
    max_model_len: int
    pid: int
    node_id: str = ""


async def abort_within(
    limit_s: float, worker_id: str, handle: WorkerHandle, request_id: str, attempt: int
) -> None:
    """Tell a worker to free what the attempt holds. Never raises: a worker that does not answer holds
    nothing, or leases that expire by themselves."""
    try:
        async with asyncio.timeout(limit_s):
            await handle.abort(request_id, attempt)
    except Exception as error:
        log.info("abort was not answered", worker=worker_id, request=request_id, error=str(error))


async def announce_within(limit_s: float, handle: PrefillHandle, request: GenerationRequest) -> bool:
    """Have a worker announce a prompt to the store. Never raises; False: it did not answer."""
    try:
        async with asyncio.timeout(limit_s):
            await handle.announce(request)
    except Exception as error:
        log.info("announcement was not answered", request=request.request_id, error=str(error))
        return False
    return True


class Polled(Protocol):
    """Events after the cursor that was asked for, in the order they happened, and where to ask next;
    and which requests and attempts were `preempted` and have had no token since."""

    @property
    def cursor(self) -> int: ...

    @property
    def events(self) -> Sequence[TokenEvent]: ...

    @property
    def preempted(self) -> Sequence[tuple[str, int]]: ...


class WorkerHandle(Protocol):
    async def abort(self, request_id: str, attempt: int) -> None:
        """Stop and free what the attempt holds. Idempotent."""
        ...

    async def counters(self) -> Mapping[str, float]:
        """Counters since the worker began, gauges as they are. Also what liveness is asked by."""
        ...


class PrefillHandle(WorkerHandle, Protocol):
    async def prefill(self, request: GenerationRequest) -> FirstToken:
        """Compute (or onboard) the prompt and sample one token. Publishing goes on in the background."""
        ...

    async def handoff(self, request_id: str, attempt: int) -> Handoff | None:
        """What decode goes on from; the caller owns its leases. None: there is nothing to hand off."""
        ...

    async def announce(self, request: GenerationRequest) -> None:
        """The prompt will be asked for soon, of this worker or of another one over the same store."""
        ...


class DecodeHandle(WorkerHandle, Protocol):
    async def start(self, handoff: Handoff) -> None:
        """Take the handoff over and generate; tokens come out of poll()."""
        ...

    async def poll(self, cursor: int, timeout_s: float) -> Polled:
        """Wait up to `timeout_s` for events of any sequence after `cursor` (0: from the first it keeps)."""
        ...
