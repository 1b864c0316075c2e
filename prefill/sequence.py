"""One prompt in the prefill role: what it holds, and what it has been told so far. A value with a life.

enlisted -> matched (leases, lent slots) -> admitted (slots) -> parked (first token) -> fetched | expired
             any of them -> ended: nothing is held any more
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import structlog

from engine.local_run import LocalRun
from engine.publisher import Publication
from engine.store_link import Leases
from engine.types import CompletedBlock, FirstToken, GenerationRequest, TokenEvent
from kvstore.lineage import Lineage
from kvstore.nouns import PinnedBlock
from kvstore.session import StoreSession

__all__ = ["Prefilling"]


@dataclass(slots=True, eq=False)
class Prefilling:
    """The sink of its sequence in the worker loop. Only the role changes its fields."""

    request: GenerationRequest
    lineage: Lineage
    log: Any = field(init=False)
    drawn: asyncio.Future[TokenEvent] = field(init=False)
    task: asyncio.Task[Any] | None = None  # the call that works on it now
    session: StoreSession | None = None
    leases: Leases = ()  # of the match; at the handoff, of the publications as well
    leased_at: float = 0.0
    local: LocalRun | None = None  # its share of the worker's own pool
    onboarded: tuple[PinnedBlock, ...] = ()  # the chain's first blocks, in the engine and pinned in the store
    publication: Publication | None = None
    first: FirstToken | None = None
    parked_at: float = 0.0
    fetching: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.drawn = asyncio.get_running_loop().create_future()
        logger = structlog.get_logger("prefill")
        self.log = logger.bind(request_id=self.request.request_id, attempt=self.request.attempt)

    @property
    def name(self) -> str:
        return f"attempt {self.request.attempt} of request {self.request.request_id}"

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that is computed before the first new token is drawn."""
        return self.request.prompt_ids + self.request.output_ids

    def parked_since(self, now: float) -> float:
        """Seconds since it was parked; 0 while it computes or is being fetched."""
        return now - self.parked_at if self.first is not None and not self.fetching else 0.0

    def on_block(self, block: CompletedBlock) -> None:
        if self.publication is not None:
            self.publication.offer(block)

    def on_token(self, event: TokenEvent) -> None:
        if not self.drawn.done():
            self.drawn.set_result(event)

    def on_error(self, error: Exception) -> None:
        if not self.drawn.done():
            self.drawn.set_exception(error)
