"""A transaction by token ids: staged on the shards, seen by nobody, visible when committed.

    async with session.transaction() as txn:      leaving by an exception aborts
        await txn.put(token_ids, kv)

On one shard a commit is atomic: all its blocks at one revision. Over several shards it lands shard by shard,
which costs a reader no more than a shorter prefix. A shard that fails refuses its blocks by name.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import structlog

from kvstore.answers import PublishBlock, Put, put_of
from kvstore.deadline import Deadline
from kvstore.errors import ConfigError, KVStrataError
from kvstore.lineage import Lineage, publishable
from kvstore.matching import all_of, parts_of, place
from kvstore.nouns import PinnedBlock, Quality, Refusal, ShardId
from kvstore.peers import ERRAND_TIMEOUT_S, refusal_of, this_process
from kvstore.publication import Publication, Staged
from kvstore.retention import RetentionRange, check_ranges
from kvstore.tensors import KVArray

if TYPE_CHECKING:
    from kvstore.by_tokens import ByTokens, TokenIds

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Staged:
    """One put: its blocks' answers so far, and the shards' transactions with the positions they cover."""

    start: int
    answers: list[PinnedBlock | Refusal]
    parts: list[tuple[list[int], Staged]]


class Transaction:
    """`committed` holds the answer of each put, in order, once the transaction is committed."""

    def __init__(self, session: ByTokens, lease_s: float, timeout_s: float) -> None:
        self._session = session
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._puts: list[_Staged] = []
        self._over = False
        self.committed: tuple[Put, ...] = ()

    async def put(
        self,
        token_ids: TokenIds,
        kv: KVArray,
        *,
        start: int = 0,
        over: Lineage | None = None,
        quality: Quality = Quality.LOSSLESS,
        retention: Sequence[RetentionRange] = (),
        timeout_s: float | None = None,
    ) -> None:
        """Send the KV to its shards, arguments as of `StoreSession.put`. Nobody sees it yet.

        Raises ConfigError when the transaction is over, ValueError for arrays that do not fit the layout.
        """
        if self._over:
            raise ConfigError("this transaction is over: begin another with session.transaction()")
        check_ranges(retention)
        size = self._session.layout.block_tokens
        at = publishable(quality, over)
        made, bits = self._session._chain(token_ids), self._session._checked(kv, token_ids, start)
        if at is None:
            self._puts.append(_Staged(start, [Refusal.EPOCH] * (bits.shape[2] // size), []))
            return
        blocks = await self._session._cut(made, bits, start // size)
        staged = _Staged(start, [Refusal.SHARD_UNAVAILABLE] * len(blocks), [])
        self._puts.append(staged)
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        await self._stage(staged, blocks, at, tuple(retention), deadline)

    async def commit(self) -> tuple[Put, ...]:
        """Make visible what was put. Done by leaving the block; a second time it is the same answer."""
        if self._over:
            return self.committed
        self._over = True
        deadline = Deadline(self._timeout_s)
        parts = [(put, mine, part) for put in self._puts for mine, part in put.parts]
        await asyncio.gather(*(self._commit(put, mine, part, deadline) for put, mine, part in parts))
        size = self._session.layout.block_tokens
        self.committed = tuple(put_of(put.answers, put.start, size) for put in self._puts)
        for put in self._puts:
            for answer in put.answers:
                if isinstance(answer, Refusal):
                    self._session._peers.counters[f"refused:{answer.value}"] += 1
        return self.committed

    async def abort(self) -> None:
        """Free what was put. Bounded; a shard that does not hear of it lets the lease expire."""
        if self._over:
            return
        self._over = True
        await asyncio.gather(*(self._abort(part) for put in self._puts for _, part in put.parts))

    async def __aenter__(self) -> Transaction:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.commit()
        elif isinstance(error, Exception):
            await self.abort()
        elif not self._over:  # cancelled, or ended: nobody waits for us any more
            self._over = True
            for put in self._puts:
                for _, part in put.parts:
                    part.abort(self._session._peers)

    # -- inside ------------------------------------------------------------------------------------

    async def _stage(
        self,
        put: _Staged,
        blocks: list[PublishBlock],
        at: Quality,
        retention: Sequence[RetentionRange],
        deadline: Deadline,
    ) -> None:
        session = self._session
        publication = Publication(
            session.namespace, session.epoch, at, session.layout, this_process(), None, retention
        )

        async def stage_on(shard: ShardId, mine: list[int]) -> None:
            chosen = [blocks[i] for i in mine]
            try:
                async with asyncio.timeout_at(deadline.at):
                    part = await session._retried(
                        shard,
                        lambda t: publication.stage(session._peers, t, chosen, self._lease_s, deadline),
                        deadline,
                    )
            except (KVStrataError, TimeoutError) as error:
                log.warning("blocks not staged", shard=shard, blocks=len(mine), error=str(error))
                for i in mine:
                    put.answers[i] = refusal_of(error)
            else:
                put.parts.append((mine, part))

        placed = place([block.placement for block in blocks], session._peers.weights)
        await all_of(stage_on(*part) for part in parts_of(placed))

    async def _commit(self, put: _Staged, mine: list[int], part: Staged, deadline: Deadline) -> None:
        found: list[PinnedBlock | Refusal]
        try:
            async with asyncio.timeout_at(deadline.at):
                found, _ = await part.commit(self._session._peers, None, deadline)
        except (KVStrataError, TimeoutError) as error:
            log.warning("blocks not committed", blocks=len(mine), error=str(error))
            found = [refusal_of(error)] * len(mine)
        for i, answer in zip(mine, found, strict=True):
            put.answers[i] = answer

    async def _abort(self, part: Staged) -> None:
        with contextlib.suppress(KVStrataError, TimeoutError):
            async with asyncio.timeout(ERRAND_TIMEOUT_S):
                await part.transport.abort(part.txn, timeout_s=ERRAND_TIMEOUT_S)
