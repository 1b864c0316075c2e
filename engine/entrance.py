"""The way into an engine: who is next, and is there room?

    in line (engine/turns.py) -> its turn: room is made and looked for -> taken in
           ^------------- somebody more urgent came -----|

Idle blocks of the edge shard make room, before the engine is asked whether the request fits; so do blocks
that are lent to those behind it in the line.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from engine.edge import EdgeShard
from engine.engine_thread import EngineThread, SequenceSink, SyncEngine
from engine.errors import WeightsChanged
from engine.local_run import LocalRun
from engine.turns import OrderedTurns, Urgency, too_late
from engine.types import GenerationRequest
from kvstore.clock import Clock
from kvstore.errors import ConfigError, OverLimit

__all__ = ["Admitted", "Entrance"]

PEERS_LEASE_LOOK_S: Final = 0.25
"""Between two looks for room while blocks of the pool may be pinned by other workers: nobody tells when they
end."""


@dataclass(slots=True, eq=False)
class Admitted:
    """One attempt, from its first admission to its end. A preempted one waits in `again`, which
    stays until its next token."""

    attempt: int
    sink: SequenceSink
    hold: bool
    local: LocalRun | None
    urgency: Urgency
    as_of: int | None = None  # the entrance's `changes` that it was read for; None: it was not
    next_block: int = 0  # the first one its sink has not been told of, and that was not onboarded
    running: bool = False  # steps compute it: in the engine, and neither ended nor parked
    again: asyncio.Task[None] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """As the engine's sequences are ordered."""
        return self.urgency.priority, self.urgency.arrival

    @property
    def lent(self) -> int:
        """Slots of others that it reads, or will."""
        return 0 if self.local is None else len(self.local.slots)


class Entrance:
    """One worker loop's. `freed` is to be set whenever the engine may have room that it had not."""

    def __init__(
        self,
        engine: SyncEngine,
        thread: EngineThread,
        edge: EdgeShard | None,
        clock: Clock,
        is_releasing: Callable[[], bool],
    ) -> None:
        self.freed = asyncio.Event()
        self.changes = 0  # of the weights
        self.entering: Admitted | None = None  # whose turn it is: no step of those behind it takes from it
        self._engine = engine
        self._thread = thread
        self._edge = edge
        self._clock = clock
        self._is_releasing = is_releasing
        self._turns = OrderedTurns(1)

    async def enter(
        self,
        request: GenerationRequest,
        record: Admitted,
        take_in: Callable[[], Awaitable[bool]],
        timeout_s: float,
    ) -> None:
        """Wait for its turn and for room, then `take_in`, which answers False if the room is gone by then.
        Raises OverLimit, DeadlineExceeded, ConfigError, and what `take_in` raises."""
        left_s = record.urgency.deadline_at - self._clock.now()
        try:
            async with asyncio.timeout(min(timeout_s, left_s)):
                entered = False
                while not entered:
                    self.freed.set()  # whoever has its turn sees that we wait
                    async with self._turns.turn(record.urgency):
                        with self._edge.admission() if self._edge is not None else contextlib.nullcontext():
                            entered = await self._in_turn(request, record, take_in)
        except TimeoutError:
            if left_s < timeout_s:
                raise too_late(request) from None
            raise OverLimit(
                f"request {request.request_id} found no room in this engine within {timeout_s:.1f} s"
            ) from None

    async def _in_turn(
        self,
        request: GenerationRequest,
        record: Admitted,
        take_in: Callable[[], Awaitable[bool]],
    ) -> bool:
        """It is this one's turn: wait for room and take it in. False: somebody more urgent came."""
        if not await self._thread.submit(self._engine.can_ever_admit, request):
            raise ConfigError(
                f"request {request.request_id} of {len(request.prompt_ids)} prompt tokens and max_tokens "
                f"{request.sampling.max_tokens} does not fit this engine even when it is empty: shorten "
                "the prompt, lower max_tokens, or raise engine.pool_nbytes or engine.max_model_len"
            )
        self.entering = record
        try:
            while not self._turns.is_overtaken(record.urgency):
                self.check_weights(record)
                if record.urgency.deadline_at <= self._clock.now():
                    raise too_late(request)
                self.freed.clear()  # before asking: what is freed meanwhile must not be missed
                if record.again is not None and record.local is not None and record.local.gone:
                    record.local = record.local.again(request)
                if not self._is_releasing():
                    self._make_room(request, record)
                if await self._fits(request, record) and await take_in():
                    return True
                if self._is_releasing() or not self._make_room(request, record):
                    await self._some_room()
            return False
        finally:
            self.entering = None

    def check_weights(self, record: Admitted) -> None:
        """Raises WeightsChanged. Who comes back after a preemption was let go of when they changed."""
        if record.again is None and record.as_of not in (None, self.changes):
            raise WeightsChanged("the weights changed while it waited: what was read for it is of the old")

    async def _fits(self, request: GenerationRequest, record: Admitted) -> bool:
        can_admit, lent = self._engine.can_admit, record.lent
        return await self._thread.submit(can_admit, request, hold=record.hold, lent=lent)

    def _make_room(self, request: GenerationRequest, record: Admitted) -> bool:
        """Idle blocks of the cache go, as many as are needed and if they are enough. Did anything change?"""
        if self._edge is None:
            return False
        needed = self._engine.blocks_needed(request, hold=record.hold)
        return self._edge.make_room(needed - record.lent, record.local)

    async def _some_room(self) -> None:
        if self._edge is None:
            await self.freed.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PEERS_LEASE_LOOK_S):
                await self.freed.wait()
