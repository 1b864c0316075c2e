"""An engine's own thread, what is asked of the engine in it, and who is told what its sequences yield."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from engine.types import CompletedBlock, GenerationRequest, Shortage, StepResult, TailKV, TokenEvent

__all__ = ["EngineThread", "Payload", "SequenceSink", "SyncEngine", "admit_if_it_fits", "step_if_it_fits"]

P = ParamSpec("P")
T = TypeVar("T")
Payload = memoryview | npt.NDArray[np.uint8]


class SyncEngine(Protocol):
    """What the loop asks of `engine.Engine`, from the engine thread unless it says otherwise."""

    def can_ever_admit(self, request: GenerationRequest) -> bool: ...

    def can_admit(self, request: GenerationRequest, *, hold: bool = False, lent: int = 0) -> bool: ...

    def blocks_needed(self, request: GenerationRequest, *, hold: bool = False) -> int:
        """From any thread."""
        ...

    def admit(
        self,
        request: GenerationRequest,
        *,
        lent: Sequence[int] = (),
        blocks: Sequence[Payload] = (),
        tail: TailKV | None = None,
        hold: bool = False,
        keep: bool = False,
        arrival: int | None = None,
    ) -> tuple[int, ...]: ...

    def shortage(self) -> Shortage | None:
        """Of the next step."""
        ...

    def step(self) -> StepResult: ...

    def take_tail(self, request_id: str) -> TailKV | None: ...

    def release(self, request_id: str) -> None: ...

    def has_work(self) -> bool: ...


class SequenceSink(Protocol):
    """Who wants what a sequence yields. Called on the event loop; must neither wait nor raise."""

    def on_block(self, block: CompletedBlock) -> None:
        """A block became full. Its tokens were all told by earlier events, or came with the request."""
        ...

    def on_token(self, event: TokenEvent) -> None: ...

    def on_error(self, error: Exception) -> None:
        """The engine failed on it; it is already released."""
        ...


class EngineThread:
    """The one thread that loads and runs an engine. Calls run one by one, in the order they are asked."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Queue the call at once, before this returns; the future is the event loop's."""
        return asyncio.wrap_future(self._executor.submit(call, *args, **kwargs))

    async def close(self) -> None:
        """Waits for the call that runs; those that wait are dropped."""
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)


def admit_if_it_fits(
    engine: SyncEngine,
    admit: Callable[[], tuple[int, ...]],
    request: GenerationRequest,
    hold: bool,
    lent: int,
) -> tuple[int, ...] | None:
    """In the engine thread: a step may have taken what was free when it was asked before."""
    return admit() if engine.can_admit(request, hold=hold, lent=lent) else None


def step_if_it_fits(engine: SyncEngine, may_make_room: bool) -> StepResult | Shortage | None:
    """In the engine thread. A shortage: nothing was done."""
    if not engine.has_work():
        return None
    return (engine.shortage() if may_make_room else None) or engine.step()
