"""Look-ups: matches of requests' tokens in the background, and the leases they hold until a load has ended.

A look-up belongs to its request. vLLM's thread begins it, reads `done` and `hit`, and drops it; all else
happens on the loop, where a match is never cancelled, since its answer may hold pins that only we can name:
what was dropped meanwhile is released as it comes. Leases are renewed while they are held, by one task.

    begin -> [match of every rank] -> done, hit is None
                                   -> done, hit: pinned, renewed --- drop --> released
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from kvstore.answers import Leases, Match
from kvstore.errors import KVStrataError
from kvstore.integrations.vllm.adapters import Adapters, LoraRequest
from kvstore.integrations.vllm.figures import Figures
from kvstore.integrations.vllm.identity import Identity
from kvstore.integrations.vllm.keys import Tokens, chain_keys
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.nouns import KEYS_MAX, Epoch, MissReason, PinnedBlock, Tier
from kvstore.peers import this_process
from kvstore.session import StoreSession

__all__ = ["Hit", "Lookup", "Lookups", "Question"]

LEASE_S: Final = 30.0
AT_ONCE_MAX: Final = 32  # matches under way
AGAIN_S, AGAIN_S_MAX = 0.005, 0.25  # between two matches of a handoff that is not there yet

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """`tokens` of one request. `at_least`: how many of them somebody is publishing, who is waited for up to
    `wait_s`. Without `hold` only the number of tokens found is wanted, and nothing stays pinned."""

    tokens: Tokens
    salt: str = ""
    lora: LoraRequest | None = None
    at_least: int = 0
    wait_s: float = 0.0
    hold: bool = True


@dataclass(frozen=True, slots=True)
class Hit:
    """`runs` has every rank's pinned blocks, from the sequence's first on: `tokens` of them."""

    epoch: Epoch
    tokens: int
    runs: tuple[tuple[PinnedBlock, ...], ...]
    leases: tuple[Leases, ...]
    session: StoreSession  # any rank's: leases are the shards'

    def by_tier(self, begin: int, end: int) -> dict[Tier, int]:
        """Where tokens `begin .. end` lie, by the tier of their blocks on rank 0."""
        tokens: dict[Tier, int] = {}
        block = self.tokens // len(self.runs[0])
        for index in range(begin // block, -(-end // block)):
            part = min(end, (index + 1) * block) - max(begin, index * block)
            tier = self.runs[0][index].tier
            tokens[tier] = tokens.get(tier, 0) + part
        return tokens


class Lookup:
    """One question. vLLM's thread reads it; the loop alone writes it, `hit` at any time: read that once."""

    __slots__ = ("adapter", "done", "found", "hit", "is_dropped", "question")

    def __init__(self, question: Question) -> None:
        self.question = question
        self.done = False
        self.hit: Hit | None = None
        self.found = 0  # tokens, also where nothing is held
        self.adapter: str | None = None  # its name, once done; None: it has none
        self.is_dropped = False


class Lookups:
    def __init__(self, side: StoreSide, setup: Setup, identity: Identity, figures: Figures) -> None:
        self._side = side
        self._setup = setup
        self._identity = identity
        self._figures = figures
        self.adapters = Adapters()
        self._turns = asyncio.Semaphore(AT_ONCE_MAX)
        self._held: set[Lookup] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._begun = self._answered = 0  # of vLLM's thread, and of the loop
        self._answer_came = threading.Event()

    # -- from vLLM's thread ------------------------------------------------------------------------

    def begin(self, question: Question) -> Lookup:
        lookup = Lookup(question)
        self._begun += 1
        self._side.begin(self._look_up(lookup))
        return lookup

    def wait_for_an_answer(self, timeout_s: float) -> None:
        """If any is outstanding. For a step without work: vLLM would ask again at once, and take the
        interpreter from whoever looks up."""
        self._answer_came.clear()
        if self._answered < self._begun:
            self._answer_came.wait(timeout_s)

    def drop(self, lookup: Lookup, leave_for_s: float = 0.0) -> None:
        """Let go of what it holds, or will. With `leave_for_s` that is pinned so long, and then expires."""
        self._side.tell(self._dropped, lookup, leave_for_s)

    # -- on the loop -------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Look-ups whose leases are renewed."""
        return len(self._held)

    async def renew(self) -> None:
        """Once, of all that are held, side by side: a silent shard holds up nobody else's. One whose lease is
        gone is a hit of nothing from then on; what was read of it before misses."""

        async def renewed(lookup: Lookup) -> None:
            hit = lookup.hit
            if hit is None or await hit.session.renew(_all(hit.leases), LEASE_S):
                return
            if lookup in self._held:
                self._figures.count("leases_lost")
                self._held.discard(lookup)
                lookup.hit = None

        await asyncio.gather(*(renewed(lookup) for lookup in self._held))

    async def _look_up(self, lookup: Lookup) -> None:
        """An error that is none of the store's is the caller's to log; it answers all the same."""
        began, hit = self._side.clock.now(), None
        try:
            hit = await self._awaited(lookup, began)
        except (KVStrataError, OSError) as error:
            self._figures.count("lookups_failed")
            log.warning("a look-up failed", error=str(error))
        finally:
            await self._answer(lookup, hit, began)

    async def _answer(self, lookup: Lookup, hit: Hit | None, began: float) -> None:
        self._figures.took("lookup", self._side.clock.now() - began)
        if hit is not None and (lookup.is_dropped or not lookup.question.hold):
            await hit.session.release(_all(hit.leases))
        if hit is not None and not lookup.is_dropped and lookup.question.hold:
            self._held.add(lookup)
            self._keep_renewing()
            lookup.hit = hit
        lookup.found = hit.tokens if hit is not None else 0
        lookup.done = True
        self._answered += 1
        self._answer_came.set()

    async def _awaited(self, lookup: Lookup, began: float) -> Hit | None:
        """Asked again until somebody else's publication is there, has had its time, or cannot be seen."""
        question, delay_s = lookup.question, AGAIN_S
        while True:
            async with self._turns:
                hit, may_come = (None, False) if lookup.is_dropped else await self._matched(lookup)
            if lookup.is_dropped or (hit.tokens if hit else 0) >= question.at_least:
                return hit
            if not may_come or self._side.clock.now() - began >= question.wait_s:
                self._figures.count("handoffs_incomplete")
                return hit
            if hit is not None:
                await hit.session.release(_all(hit.leases))
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, AGAIN_S_MAX)

    async def _matched(self, lookup: Lookup) -> tuple[Hit | None, bool]:
        """What is there now, and whether asking again soon may find more: not of a store that is away."""
        question = lookup.question
        lookup.adapter = await self.adapters.name_of(question.lora)
        if lookup.adapter is None:
            self._figures.count("miss:adapter_unknown")
            return None, False
        epoch = await self._identity.known()
        if epoch is None:
            self._figures.count("miss:no_epoch")
            return None, False
        sessions: list[StoreSession] = []
        for rank in range(len(self._setup.specs)):
            session = await self._side.session(self._setup.spec_of(rank, lookup.adapter), epoch)
            if session is None:
                self._figures.count("miss:store_unreachable")
                return None, False
            sessions.append(session)
        matches = await asyncio.gather(*(self._match_of(session, question) for session in sessions))
        return await self._shortest(epoch, sessions, matches)

    async def _match_of(self, session: StoreSession, question: Question) -> Match:
        keys = chain_keys(session.namespace, question.tokens, session.layout.block_tokens, question.salt)
        return await session.match(
            keys[:KEYS_MAX],
            owner=this_process(),
            lease_s=LEASE_S,
            timeout_s=self._setup.config.lookup_timeout_s,
        )

    async def _shortest(
        self, epoch: Epoch, sessions: Sequence[StoreSession], matches: Sequence[Match]
    ) -> tuple[Hit | None, bool]:
        run = min(len(match.blocks) for match in matches)
        leases = tuple(match.leases for match in matches)
        misses = [match.miss for match in matches if match.miss is not None and len(match.blocks) == run]
        if misses:
            self._figures.count(f"miss:{misses[0].value}")
        may_come = MissReason.SHARD_UNAVAILABLE not in misses
        if run == 0:
            if _all(leases):
                await sessions[0].release(_all(leases))
            return None, may_come
        runs = tuple(tuple(match.blocks[:run]) for match in matches)
        return Hit(epoch, run * sessions[0].layout.block_tokens, runs, leases, sessions[0]), may_come

    def _dropped(self, lookup: Lookup, leave_for_s: float) -> None:
        if lookup.is_dropped:
            return
        lookup.is_dropped = True
        if lookup in self._held:
            self._held.discard(lookup)
            if lookup.hit is not None:
                self._side.spawn(self._let_go(lookup.hit, leave_for_s))
        if not self._held and self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None

    async def _let_go(self, hit: Hit, leave_for_s: float) -> None:
        if leave_for_s:
            await hit.session.renew(_all(hit.leases), leave_for_s)
        else:
            await hit.session.release(_all(hit.leases))

    def _keep_renewing(self) -> None:
        if self._renewing is None:
            self._renewing = self._side.loop.create_task(self._renew_on())

    async def _renew_on(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            await self.renew()


def _all(leases: Sequence[Leases]) -> Leases:
    return tuple(lease for of_rank in leases for lease in of_rank)
