"""A session over all ranks' namespaces, which to a worker's roles is a session like another.

    keys      a chain of rank 0's keys, each with the other ranks' (RankedChain)
    match     every rank's, at one time: the run that all of them have
    read      every rank's streams side by side, block by block: one payload of all ranks
    publish   every rank's part of a payload into its own namespace

All of it in rank 0's process: other ranks' KV comes and goes over their links (pool.py). Costs as many calls
as there are ranks. A block that one rank lacks is a miss, whatever the others hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Final, Protocol, cast

from engine.parallel.agreement import (
    RankedBlock,
    RankedKey,
    joined_block,
    shares,
    shortest_match,
    whole_publication,
)
from kvstore.answers import BlockMiss, Match, PublishBlock, Published, VerifiedBlock
from kvstore.hashing import KeyChain
from kvstore.nouns import ROOT_KEY, BlockKey, LeaseId, NamespaceId, PinnedBlock, Quality, ShardId
from kvstore.prefetching import PrefetchResult
from kvstore.session import StoreSession

__all__ = ["NO_NAMESPACE", "RankedChain", "RankedSession", "Session", "key_chain"]

NO_NAMESPACE: Final = NamespaceId(bytes(16))
"""Of a chain that was made while the store was away: none of its blocks leaves this process."""

Answer = VerifiedBlock | BlockMiss
Leases = Sequence[tuple[ShardId, LeaseId]]


class Session(Protocol):
    """What a worker does with a store: `StoreSession`'s own methods."""

    @property
    def namespace(self) -> NamespaceId: ...

    async def match(
        self, keys: Sequence[BlockKey], *, owner: str, lease_s: float, timeout_s: float
    ) -> Match: ...

    async def announce(self, keys: Sequence[BlockKey], *, timeout_s: float) -> PrefetchResult: ...

    def read(self, blocks: Sequence[PinnedBlock], *, timeout_s: float) -> AsyncIterator[Answer]: ...

    async def publish(
        self,
        blocks: Sequence[PublishBlock],
        *,
        quality: Quality,
        owner: str,
        pin_for_s: float | None,
        timeout_s: float,
    ) -> Published: ...

    async def renew(self, leases: Leases, lease_s: float) -> bool: ...

    async def release(self, leases: Leases) -> None: ...


class RankedChain(KeyChain):
    """`keys` are `RankedKey`s, made of one chain a namespace."""

    __slots__ = ("_ranks",)

    def __init__(self, namespaces: Sequence[NamespaceId], block_tokens: int) -> None:
        super().__init__(namespaces[0], block_tokens)
        self._ranks = [KeyChain(namespace, block_tokens) for namespace in namespaces]

    def extend(self, tokens: Sequence[int]) -> None:
        for chain in self._ranks:
            chain.extend(tokens)
        known = len(self.keys)
        new = zip(*(chain.keys[known:] for chain in self._ranks), strict=True)
        self.keys += [BlockKey(RankedKey.of(keys)) for keys in new]
        self.pending = self._ranks[0].pending


class RankedSession:
    """`ranks` are of one tenant and epoch, in the order of ranks."""

    def __init__(self, ranks: Sequence[StoreSession]) -> None:
        self._ranks = ranks

    @property
    def namespace(self) -> NamespaceId:
        """Rank 0's: of no other division into ranks."""
        return self._ranks[0].namespace

    @property
    def namespaces(self) -> list[NamespaceId]:
        return [session.namespace for session in self._ranks]

    async def match(self, keys: Sequence[BlockKey], *, owner: str, lease_s: float, timeout_s: float) -> Match:
        parts = zip(self._ranks, _keys_of(keys, len(self._ranks)), strict=True)
        asked = (s.match(mine, owner=owner, lease_s=lease_s, timeout_s=timeout_s) for s, mine in parts)
        return shortest_match(await asyncio.gather(*asked))

    async def announce(self, keys: Sequence[BlockKey], *, timeout_s: float) -> PrefetchResult:
        """What is said is rank 0's answer."""
        parts = zip(self._ranks, _keys_of(keys, len(self._ranks)), strict=True)
        told = await asyncio.gather(*(s.announce(mine, timeout_s=timeout_s) for s, mine in parts))
        return told[0]

    async def read(self, blocks: Sequence[PinnedBlock], *, timeout_s: float) -> AsyncGenerator[Answer, None]:
        """In order; the stream that is behind holds the others back."""
        parts = [blocks, *zip(*(cast(RankedBlock, block).others for block in blocks), strict=True)]
        async with contextlib.AsyncExitStack() as closing:
            streams: list[AsyncGenerator[Answer, None]] = []
            for session, mine in zip(self._ranks, parts, strict=True):
                stream: Any = session.read(mine, timeout_s=timeout_s)
                streams.append(await closing.enter_async_context(contextlib.aclosing(stream)))
            for _ in blocks:
                yield joined_block([await anext(stream) for stream in streams])

    async def publish(
        self,
        blocks: Sequence[PublishBlock],
        *,
        quality: Quality,
        owner: str,
        pin_for_s: float | None,
        timeout_s: float,
    ) -> Published:
        parts = zip(*(_parts_of(block, len(self._ranks)) for block in blocks), strict=True)
        offered = (
            session.publish(mine, quality=quality, owner=owner, pin_for_s=pin_for_s, timeout_s=timeout_s)
            for session, mine in zip(self._ranks, parts, strict=True)
        )
        return whole_publication(await asyncio.gather(*offered))

    async def renew(self, leases: Leases, lease_s: float) -> bool:
        """They are the shards', of whichever rank."""
        return await self._ranks[0].renew(leases, lease_s)

    async def release(self, leases: Leases) -> None:
        await self._ranks[0].release(leases)


def key_chain(session: Session | None, block_tokens: int) -> KeyChain:
    """For the keys of one sequence in the session's namespaces; without one they lead nowhere."""
    if isinstance(session, RankedSession):
        return RankedChain(session.namespaces, block_tokens)
    return KeyChain(session.namespace if session is not None else NO_NAMESPACE, block_tokens)


def _keys_of(keys: Sequence[BlockKey], ranks: int) -> list[list[BlockKey]]:
    """Each rank's own."""
    by_rank: list[list[BlockKey]] = [[] for _ in range(ranks)]
    for key in keys:
        for mine, own in zip(by_rank, (key, *_others(key, ranks)), strict=True):
            mine.append(own)
    return by_rank


def _others(key: BlockKey, ranks: int) -> tuple[BlockKey, ...]:
    """Of the key of a RankedChain; all chains have one root."""
    return (ROOT_KEY,) * (ranks - 1) if key == ROOT_KEY else cast(RankedKey, key).others


def _parts_of(block: PublishBlock, ranks: int) -> list[PublishBlock]:
    columns = _keys_of((block.key, block.parent, block.placement), ranks)
    return [
        PublishBlock(key, parent, block.chain_index, placement, payload)
        for (key, parent, placement), payload in zip(columns, shares(block.payload, ranks), strict=True)
    ]
