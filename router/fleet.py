"""Which workers there are, how loaded each is, and which pair takes the next request.

A request needs a prefill and a decode worker of one epoch: KV of other weights never meets it. Among those
the least loaded wins, ties fall at random (a fixed order would send every idle moment's request to the same
worker). Load is counted here, in tokens this router has given out and not seen finished: no worker is
asked.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvstore.nouns import Epoch
from router.epochs import Intake, Transitions
from router.errors import NotReady
from router.handles import DecodeHandle, PrefillHandle, WorkerFacts, WorkerHandle

__all__ = ["Fleet", "Member", "Pair"]

H = TypeVar("H", bound=WorkerHandle, covariant=True)


@dataclass(slots=True, eq=False)
class Member(Generic[H]):
    """One worker. `load` is in tokens: prompts to compute on prefill, contexts held on decode."""

    facts: WorkerFacts
    handle: H
    load: int = 0
    requests: int = 0

    @contextmanager
    def carrying(self, tokens: int) -> Iterator[None]:
        self.load += tokens
        self.requests += 1
        try:
            yield
        finally:
            self.load -= tokens
            self.requests -= 1


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: Member[PrefillHandle]
    decode: Member[DecodeHandle]

    @property
    def epoch(self) -> Epoch:
        return self.prefill.facts.epoch


@dataclass(slots=True)
class Fleet:
    """Changed by the supervisor as workers come and go. Lives on one event loop."""

    prefill: dict[str, Member[PrefillHandle]] = field(default_factory=dict)
    decode: dict[str, Member[DecodeHandle]] = field(default_factory=dict)
    noise: random.Random = field(default_factory=random.SystemRandom)
    transitions: Transitions = field(default_factory=Transitions)
    intake: Intake = field(default_factory=Intake)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add_prefill(self, member: Member[PrefillHandle]) -> None:
        self.prefill[member.facts.worker_id] = member
        self._changed.set()

    def add_decode(self, member: Member[DecodeHandle]) -> None:
        self.decode[member.facts.worker_id] = member
        self._changed.set()

    def changed_weights(self, facts: WorkerFacts) -> None:
        """A worker is of another epoch from now on."""
        for members in (self.prefill, self.decode):
            member = members.get(facts.worker_id)
            if member is not None:
                member.facts = facts
        self._changed.set()

    def remove(self, worker_id: str) -> bool:
        """False when it was not (any more) there."""
        gone = self.prefill.pop(worker_id, None) or self.decode.pop(worker_id, None)
        return gone is not None

    def epochs(self) -> set[Epoch]:
        """Those that both a prefill and a decode worker have."""
        return {m.facts.epoch for m in self.prefill.values()} & {m.facts.epoch for m in self.decode.values()}

    @property
    def max_model_len(self) -> int:
        """The least of all workers', so that a request may go anywhere. Raises NotReady."""
        members = [*self.prefill.values(), *self.decode.values()]
        if not members:
            raise NotReady("no worker is ready. Retry in a few seconds; `kvstrata status` shows why")
        return min(member.facts.max_model_len for member in members)

    def choose(self, avoid: Collection[str] = (), epoch: Epoch | None = None) -> Pair | None:
        """The least loaded pair of the newest epoch (of those under which an answer that began under `epoch`
        may go on). Workers in `avoid` come last."""
        possible = {e for e in self.epochs() if epoch is None or self.transitions.leads(epoch, e)}
        if not possible:
            return None
        newest = max(possible)
        return Pair(
            self._least_loaded(self.prefill, newest, avoid), self._least_loaded(self.decode, newest, avoid)
        )

    async def choose_within(self, wait_s: float, avoid: Collection[str], epoch: Epoch | None) -> Pair | None:
        """As choose(), but wait up to `wait_s` for workers that are being brought back. Not for weights that
        are over."""
        try:
            async with asyncio.timeout(wait_s):
                while (pair := self.choose(avoid, epoch)) is None:
                    if epoch is not None and self.transitions.is_over(epoch):
                        return None
                    self._changed.clear()
                    await self._changed.wait()
                return pair
        except TimeoutError:
            return None

    def _least_loaded(self, members: dict[str, Member[H]], epoch: Epoch, avoid: Collection[str]) -> Member[H]:
        return min(
            (member for member in members.values() if member.facts.epoch == epoch),
            key=lambda m: (m.facts.worker_id in avoid, m.load, self.noise.random()),
        )
