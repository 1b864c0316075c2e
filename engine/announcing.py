"""Prompts that wait their turn are announced to the store: what of them lies on NVMe comes up meanwhile.

Whoever announces neither waits nor fails: the work goes on in the background, one round trip each, at most
`announcing_max` at one time; more are dropped, and counted. A prompt that need not wait is not announced:
its match asks for the same thing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import structlog

from engine.background import Background
from engine.parallel.session import Session, key_chain
from engine.store_link import StoreLink
from engine.types import GenerationRequest
from kvstore.errors import KVStrataError
from kvstore.nouns import BlockKey

__all__ = ["Announcer"]

log = structlog.get_logger(__name__)


class Announcer:
    """One worker's. `counters` are labelled "prefetch:..."."""

    def __init__(
        self,
        store: StoreLink,
        background: Background,
        block_tokens: int,
        *,
        announcing_max: int,
        timeout_s: float,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._store = store
        self._background = background
        self._block_tokens = block_tokens
        self._announcing_max = announcing_max
        self._timeout_s = timeout_s
        self._announcing = 0

    def announce(self, session: Session | None, keys: Sequence[BlockKey]) -> None:
        """The keys of a prompt that waits on this worker."""
        if session is not None and keys:
            self._spawn(lambda: self._tell(session, keys))

    def announce_request(self, request: GenerationRequest) -> None:
        """A prompt that waits elsewhere: its keys are made here, where its namespace is known."""
        self._spawn(lambda: self._tell_of(request))

    # -- inside ------------------------------------------------------------------------------------

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        if self._announcing >= self._announcing_max:
            self.counters["prefetch:dropped_requests"] += self._announcing_max > 0
            return
        self._announcing += 1
        self._background.spawn(self._bounded(work), "announce a prompt")

    async def _bounded(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except KVStrataError as error:
            self.counters["prefetch:failed_requests"] += 1
            log.warning("a prompt could not be announced", error=str(error))
        finally:
            self._announcing -= 1

    async def _tell_of(self, request: GenerationRequest) -> None:
        session = await self._store.session(request.tenant)
        if session is not None:
            chain = key_chain(session, self._block_tokens)
            chain.extend(request.prompt_ids + request.output_ids)
            await self._tell(session, chain.keys)

    async def _tell(self, session: Session, keys: Sequence[BlockKey]) -> None:
        if not keys:
            return
        told = await session.announce(keys, timeout_s=self._timeout_s)
        self.counters["prefetch:announced_requests"] += 1
        self.counters["prefetch:announced_blocks"] += told.blocks
        self.counters["prefetch:coming_blocks"] += told.coming
