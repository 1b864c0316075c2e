"""One sequence in the decode role: what it holds and what it publishes. The sink of its engine sequence.

enlisted (leases) -> onboarded -> admitted (slots; leases given back) -> finished
             any of them -> ended: nothing is held any more
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from engine.local_run import LocalRun
from engine.parallel.session import Session
from engine.publisher import Publication
from engine.store_link import Leases
from engine.types import CompletedBlock, FinishReason, Handoff, TokenEvent
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import Epoch, Quality

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
    drawn: list[int] = field(default_factory=list)  # tokens since the handoff
    task: asyncio.Task[None] | None = None  # onboards and admits
    session: Session | None = None
    chain: KeyChain | None = None
    local: LocalRun | None = None  # its share of the worker's own pool
    publication: Publication | None = None
    epochs: tuple[int, ...] = field(init=False)  # of what its tokens are drawn from
    ended: bool = False

    def __post_init__(self) -> None:
        handoff, request = self.handoff, self.handoff.request
        self.leases = handoff.leases
        self.lineage = Lineage(handoff.epoch, handoff.floor, handoff.foreign)
        self.epochs = (handoff.epoch.number,)
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

    def attends_to(self, epochs: Iterable[int]) -> None:
        """KV of these, too."""
        self.epochs = tuple(sorted({*self.epochs, *epochs}))

    def keep_over(self, epoch: Epoch) -> None:
        """Go on under the weights of `epoch` over what is there: no epoch's own from here on."""
        self.lineage = Lineage(epoch, self.lineage.floor, foreign=True)
        self.attends_to((epoch.number,))
        if self.publication is not None:
            self.publication.withhold()

    def begin_again(self, epoch: Epoch) -> None:
        """With its tokens alone, under the weights of `epoch`. Nothing of it is in the engine; `leases` stay
        its own."""
        handoff = self.handoff
        request = replace(handoff.request, output_ids=(*handoff.request.output_ids, *self.drawn))
        known = len(request.prompt_ids) + len(request.output_ids)
        self.handoff = replace(
            handoff,
            request=request,
            epoch=epoch,
            floor=Quality.LOSSLESS,
            foreign=False,
            blocks=(),
            leases=(),
            tail=None,
            next_position=known - 1,
        )
        self.drawn = []
        self.lineage, self.epochs = Lineage(epoch), (epoch.number,)
        self.local, self.publication, self.chain = None, None, None

    def on_block(self, block: CompletedBlock) -> None:
        if self.publication is not None:
            self.publication.offer(block)

    def on_token(self, event: TokenEvent) -> None:
        self.next_index = event.index + 1
        if self.chain is not None and event.token_id >= 0:
            self.chain.extend([event.token_id])
        if event.token_id >= 0:
            self.drawn.append(event.token_id)
        if event.finish is FinishReason.ERROR and self.publication is not None:
            self.publication.discard()
        self.told(self, replace(event, epochs=self.epochs))

    def on_error(self, error: Exception, finish: FinishReason = FinishReason.ERROR) -> None:
        message = f"{type(error).__name__}: {error}"
        request_id, attempt, index = self.request_id, self.attempt, self.next_index
        self.told(self, TokenEvent(request_id, attempt, index, -1, finish, message, epochs=self.epochs))
