"""One sequence in the decode role: what it holds and what it publishes. The sink of its engine sequence.

enlisted (leases) -> onboarded -> admitted (slots; leases given back) -> finished
             any of them -> ended: nothing is held any more
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from engine.local_run import LocalRun
from engine.publisher import Publication
from engine.store_link import Leases
from engine.types import CompletedBlock, FinishReason, Handoff, TokenEvent
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.session import StoreSession

__all__ = ["Decoding"]


@dataclass(slots=True, eq=False)
class Decoding:
    """`told` takes each of its events in order. Only the role changes its other fields."""

    handoff: Handoff
    told: Callable[[Decoding, TokenEvent], None]
    log: Any = field(init=False)
    leases: Leases = field(init=False)
    lineage: Lineage = field(init=False)
    next_index: int = field(init=False)  # of the next output token
    task: asyncio.Task[None] | None = None  # onboards and admits
    session: StoreSession | None = None
    chain: KeyChain | None = None
    local: LocalRun | None = None  # its share of the worker's own pool
    publication: Publication | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        handoff, request = self.handoff, self.handoff.request
        self.leases = handoff.leases
        self.lineage = Lineage(handoff.epoch, handoff.floor, handoff.foreign)
        self.next_index = len(request.output_ids)
        logger = structlog.get_logger("decode")
        self.log = logger.bind(request_id=request.request_id, attempt=request.attempt)

    @property
    def request_id(self) -> str:
        return self.handoff.request.request_id

    @property
    def attempt(self) -> int:
        return self.handoff.request.attempt

    @property
    def tokens(self) -> tuple[int, ...]:
        """What is known at the start: the prompt and all output so far, the first token included."""
        return self.handoff.request.prompt_ids + self.handoff.request.output_ids

    def on_block(self, block: CompletedBlock) -> None:
        if self.publication is not None:
            self.publication.offer(block)

    def on_token(self, event: TokenEvent) -> None:
        self.next_index = event.index + 1
        if self.chain is not None and event.token_id >= 0:
            self.chain.extend([event.token_id])
        self.told(self, event)

    def on_error(self, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        request_id, attempt, index = self.request_id, self.attempt, self.next_index
        self.told(self, TokenEvent(request_id, attempt, index, -1, FinishReason.ERROR, message))
