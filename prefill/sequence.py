"""One prompt in the prefill role: what it holds, and what it has been told so far. A value with a life.

enlisted -> matched (leases, lent slots) -> admitted (slots) -> parked (first token) -> fetched | expired
             any of them -> ended: nothing is held any more
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from engine.local_run import LocalRun
from engine.parallel.session import Session
from engine.publisher import Publication
from engine.store_link import Leases
from engine.types import CompletedBlock, FinishReason, FirstToken, GenerationRequest, TokenEvent
from kvstore.lineage import Lineage
from kvstore.nouns import Epoch, PinnedBlock

if TYPE_CHECKING:
    from engine.boot import Worker

__all__ = ["Prefilling"]


@dataclass(slots=True, eq=False)
class Prefilling:
    """The sink of its sequence in the worker loop. Only the role changes its fields."""

    request: GenerationRequest
    lineage: Lineage
    log: Any = field(init=False)
    drawn: asyncio.Future[TokenEvent] = field(init=False)
    task: asyncio.Task[Any] | None = None  # the call that works on it now
    session: Session | None = None
    leases: Leases = ()  # of the match; at the handoff, of the publications as well
    leased_at: float = 0.0
    local: LocalRun | None = None  # its share of the worker's own pool
    onboarded: tuple[PinnedBlock, ...] = ()  # the chain's first blocks, in the engine and pinned in the store
    publication: Publication | None = None
    first: FirstToken | None = None
    epochs: tuple[int, ...] = field(init=False)  # of all that its KV was computed with
    parked_at: float = 0.0
    fetching: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.begin_again(self.lineage.epoch)
        logger = structlog.get_logger("prefill")
        self.log = logger.bind(request_id=self.request.request_id, attempt=self.request.attempt)

    @property
    def name(self) -> str:
        return f"attempt {self.request.attempt} of request {self.request.request_id}"

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that is computed before the first new token is drawn."""
        return self.request.prompt_ids + self.request.output_ids

    def begin_again(self, epoch: Epoch) -> None:
        """From nothing, under the weights of `epoch`. It holds nothing."""
        self.lineage, self.epochs = Lineage(epoch), (epoch.number,)
        self.drawn = asyncio.get_running_loop().create_future()
        self.onboarded = ()

    def attends_to(self, epochs: Iterable[int]) -> None:
        """KV of these, too."""
        self.epochs = tuple(sorted({*self.epochs, *epochs}))

    def keep_over(self, epoch: Epoch) -> None:
        """Go on under the weights of `epoch` over what is there: no epoch's own from here on."""
        self.lineage = Lineage(epoch, self.lineage.floor, foreign=True)
        self.attends_to((epoch.number,))
        if self.publication is not None:
            self.publication.withhold()

    def let_go(self, worker: Worker) -> None:
        """Give back slots and leases, without waiting. Idempotent."""
        worker.loop.release(self.request.request_id, self.request.attempt)
        if self.local is not None:
            self.local.abandon()
        if self.publication is not None:
            self.publication.close()
        if self.session is not None:
            worker.store.release(self.session, self.leases)
        self.leases, self.local, self.publication = (), None, None

    def parked_since(self, now: float) -> float:
        """Seconds since it was parked; 0 while it computes or is being fetched."""
        return now - self.parked_at if self.first is not None and not self.fetching else 0.0

    def on_block(self, block: CompletedBlock) -> None:
        if self.publication is not None:
            self.publication.offer(block)

    def on_token(self, event: TokenEvent) -> None:
        if event.finish is FinishReason.ERROR and self.publication is not None:
            self.publication.discard()
        if not self.drawn.done():
            self.drawn.set_result(event)

    def on_error(self, error: Exception) -> None:
        if not self.drawn.done():
            self.drawn.set_exception(error)
