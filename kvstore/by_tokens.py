"""What a session does by token ids: put and get KV as arrays, pin a prompt, write in a transaction.

Sugar over match, read and publish: keys are made from the ids, arrays are cut into whole blocks, leases are
given back. A tail that fills no block is not stored; what is not there is a shorter answer with the reasons,
never an error. Costs one copy of the KV each way beside what the blocks cost.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import numpy as np

from kvstore.answers import (
    BlockMiss,
    Hit,
    Leases,
    Match,
    PublishBlock,
    Published,
    Put,
    VerifiedBlock,
    put_of,
)
from kvstore.deadline import Deadline
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage, publishable
from kvstore.nouns import (
    BlockKey,
    Epoch,
    KVLayout,
    MissReason,
    NamespaceId,
    PinnedBlock,
    Quality,
    Refusal,
    ShardId,
)
from kvstore.peers import Peers, this_process
from kvstore.prefetching import PrefetchMode, PrefetchResult
from kvstore.publication import TXN_LEASE_S
from kvstore.retention import RetentionRange, check_ranges
from kvstore.tensors import Framework, KVArray, as_framework, bits_of, blocks_of, empty_bits, put_block
from kvstore.tiers.copying import beside_the_loop
from kvstore.transaction import Transaction
from kvstore.transport.base import ShardTransport

TokenIds = Sequence[int] | np.ndarray[Any, np.dtype[Any]]
Value = TypeVar("Value")

PUT_TIMEOUT_S: Final = 30.0
GET_TIMEOUT_S: Final = 30.0
PREFETCH_TIMEOUT_S: Final = 10.0
LEASE_BEYOND_S: Final = 5.0  # how much longer than its read a pin of `get` lasts, should we be killed


class ByTokens(ABC):
    """The half of a `StoreSession` that speaks of token ids. The other half, below, speaks of blocks."""

    _peers: Peers

    # -- what it stands on -------------------------------------------------------------------------

    @property
    @abstractmethod
    def namespace(self) -> NamespaceId: ...

    @property
    @abstractmethod
    def layout(self) -> KVLayout: ...

    @property
    @abstractmethod
    def epoch(self) -> Epoch: ...

    @abstractmethod
    async def match(
        self, keys: Sequence[BlockKey], *, owner: str, lease_s: float, timeout_s: float
    ) -> Match: ...

    @abstractmethod
    async def announce(
        self, keys: Sequence[BlockKey], *, mode: PrefetchMode, wait_s: float, timeout_s: float
    ) -> PrefetchResult: ...

    @abstractmethod
    def read(
        self, blocks: Sequence[PinnedBlock], *, timeout_s: float
    ) -> AsyncIterator[VerifiedBlock | BlockMiss]: ...

    @abstractmethod
    async def publish(
        self,
        blocks: Sequence[PublishBlock],
        *,
        quality: Quality,
        owner: str,
        pin_for_s: float | None,
        retention: Sequence[RetentionRange] = (),
        timeout_s: float,
    ) -> Published: ...

    @abstractmethod
    async def renew(self, leases: Leases, lease_s: float) -> bool: ...

    @abstractmethod
    async def release(self, leases: Leases) -> None: ...

    @abstractmethod
    async def _retried(
        self, shard: ShardId, call: Callable[[ShardTransport], Awaitable[Value]], deadline: Deadline
    ) -> Value: ...

    # -- by token ids ------------------------------------------------------------------------------

    async def put(
        self,
        token_ids: TokenIds,
        kv: KVArray,
        *,
        start: int = 0,
        over: Lineage | None = None,
        quality: Quality = Quality.LOSSLESS,
        retention: Sequence[RetentionRange] = (),
        timeout_s: float = PUT_TIMEOUT_S,
    ) -> Put:
        """Store the KV of a sequence's whole blocks; visible to every later `get` when this returns.

        `token_ids` is the sequence from its first token on; `kv` is `[layer][k,v][token][kv_head][head_dim]`
        of the layout's dtype, numpy or torch, for `token_ids[start:]`, where `start` is a multiple of
        `block_tokens`. `over` is the lineage of the KV it was computed over (a `Hit` has it): stale or lossy
        KV makes what follows lesser, or not publishable at all (refused as EPOCH). `retention` says which
        blocks are to go first or last when room is needed, by tokens of the sequence; a block that is there
        already takes what is said of it, and keeps what it has where nothing is.

        Raises ValueError for arrays that do not fit the layout; a block that is not taken is in `refused`.
        """
        check_ranges(retention)
        quality_or_none = publishable(quality, over)
        made, size = self._chain(token_ids), self.layout.block_tokens
        bits = self._checked(kv, token_ids, start)
        count = bits.shape[2] // size
        if quality_or_none is None:
            return Put(start, {Refusal.EPOCH: count} if count else {})
        blocks = await self._cut(made, bits, start // size)
        done = await self.publish(
            blocks,
            quality=quality_or_none,
            owner=this_process(),
            pin_for_s=None,
            retention=retention,
            timeout_s=timeout_s,
        )
        return put_of(done.blocks, start, size)

    async def get(
        self,
        token_ids: TokenIds,
        *,
        start: int = 0,
        framework: Framework = "numpy",
        timeout_s: float = GET_TIMEOUT_S,
    ) -> Hit:
        """The KV the store has of a sequence's longest prefix, verified on our own copy.

        `kv` is `[layer][k,v][token][kv_head][head_dim]` of the tokens `start` to `n_tokens`: a fresh array
        (numpy has no bfloat16: there it is uint16, the same bits) or, with `framework="torch"`, a tensor on
        the CPU. With nothing beyond `start` it is empty; the reasons are in `misses`.
        """
        deadline = Deadline(timeout_s)
        async with self.pin(token_ids, lease_s=timeout_s + LEASE_BEYOND_S, timeout_s=timeout_s) as pin:
            return await pin.get(start=start, framework=framework, timeout_s=deadline.left())

    async def prefetch(
        self,
        token_ids: TokenIds,
        *,
        mode: PrefetchMode = "best_effort",
        wait_s: float = 0.0,
        timeout_s: float = PREFETCH_TIMEOUT_S,
    ) -> PrefetchResult:
        """Say that a prompt will soon be asked for: what of it lies on NVMe alone comes up, and nothing is
        pinned. `mode` is how long to wait for that:

        - "best_effort": not at all; the answer says what is on its way.
        - "timeout": `wait_s` seconds at most.
        - "wait_complete": until nothing is on its way any more, as long as `timeout_s` allows.

        What is not there in time is no error, nor is a shard that does not answer. Raises ValueError for a
        mode there is not, and "timeout" without a `wait_s`.
        """
        keys = self._chain(token_ids).keys
        return await self.announce(keys, mode=mode, wait_s=wait_s, timeout_s=timeout_s)

    @asynccontextmanager
    async def pin(
        self, token_ids: TokenIds, *, lease_s: float = 30.0, timeout_s: float = GET_TIMEOUT_S
    ) -> AsyncIterator[Pinned]:
        """Keep what the store has of a prompt while the block runs, or until `lease_s` is over.

        What is pinned stays readable whatever is evicted, purged or superseded meanwhile.
        """
        keys = self._chain(token_ids).keys
        found = await self.match(keys, owner=this_process(), lease_s=lease_s, timeout_s=timeout_s)
        try:
            yield Pinned(self, found, len(keys))
        finally:
            await self.release(found.leases)

    def keys(self, token_ids: TokenIds) -> list[BlockKey]:
        """The keys of a sequence's whole blocks, as `client.purge` and watches speak of them."""
        return self._chain(token_ids).keys

    def transaction(self, *, lease_s: float = TXN_LEASE_S, timeout_s: float = PUT_TIMEOUT_S) -> Transaction:
        """`async with session.transaction() as txn: await txn.put(...)`: visible when the block is left.

        Leaving it by an exception aborts, and nothing was ever seen. What was put must be committed within
        `lease_s` of the last put: later it is refused as LEASE_EXPIRED.
        """
        return Transaction(self, lease_s, timeout_s)

    # -- inside ------------------------------------------------------------------------------------

    def _chain(self, token_ids: TokenIds) -> KeyChain:
        made = KeyChain(self.namespace, self.layout.block_tokens)
        made.extend(checked_ids(token_ids))
        return made

    def _checked(self, kv: KVArray, token_ids: TokenIds, start: int) -> np.ndarray[Any, np.dtype[Any]]:
        size = self.layout.block_tokens
        if start % size or not 0 <= start <= len(token_ids):
            raise ValueError(f"start is {start}: a multiple of {size} up to {len(token_ids)}, please")
        return bits_of(kv, self.layout, len(token_ids) - start)

    async def _cut(
        self, made: KeyChain, bits: np.ndarray[Any, np.dtype[Any]], first: int
    ) -> list[PublishBlock]:
        payloads = await beside_the_loop(bits.nbytes, lambda: blocks_of(bits, self.layout))
        return [
            PublishBlock(made.keys[i], made.parent(i), i, made.placement(i), payload)
            for i, payload in enumerate(payloads, start=first)
        ]


class Pinned:
    """What the store holds of a prompt, kept for one reader."""

    def __init__(self, session: ByTokens, found: Match, asked: int) -> None:
        self._session = session
        self._found = found
        self._asked = asked

    @property
    def n_tokens(self) -> int:
        return len(self._found.blocks) * self._session.layout.block_tokens

    @property
    def miss(self) -> MissReason | None:
        """Why it is not more; None when every whole block is here."""
        return self._found.miss

    async def get(
        self, *, start: int = 0, framework: Framework = "numpy", timeout_s: float = GET_TIMEOUT_S
    ) -> Hit:
        """As `StoreSession.get`, of what is pinned. May be repeated: the answer may only shrink."""
        layout, blocks = self._session.layout, self._found.blocks
        size = layout.block_tokens
        if start < 0 or start % size:
            raise ValueError(f"start is {start}: a multiple of {size}, please")
        first = min(start // size, len(blocks))
        bits = empty_bits(layout, (len(blocks) - first) * size)
        whys: dict[int, MissReason] = {}  # by block
        lineage, run = Lineage(self._session.epoch), first
        async for item in self._session.read(blocks[first:], timeout_s=timeout_s):
            if isinstance(item, BlockMiss):
                whys[first + item.index] = item.reason
            elif not whys:
                place = functools.partial(put_block, bits, layout, item.index, item.payload)
                await beside_the_loop(item.payload.nbytes, place)
                lineage = lineage.absorb(item.epoch, item.quality)
                run += 1
        if self.miss is not None:
            whys[len(blocks)] = self.miss
        kv = as_framework(bits[:, :, : (run - first) * size], layout, framework)
        return Hit(run * size, kv, _counted(whys, run, self._asked), lineage)

    async def renew(self, lease_s: float) -> bool:
        """Keep it for `lease_s` from now on. False when some of it is gone."""
        return await self._session.renew(self._found.leases, lease_s)


def checked_ids(token_ids: TokenIds) -> list[int]:
    """Raises ValueError for what is no sequence of token ids: a wrong id would be another block's key."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"token_ids: whole numbers in one dimension, not {ids.dtype} of {list(ids.shape)}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 32):
        raise ValueError("token_ids must be at least 0 and below 2**32")
    return [int(i) for i in ids.tolist()]


def _counted(whys: dict[int, MissReason], run: int, asked: int) -> dict[MissReason, int]:
    """Blocks that were not served, by reason; what lies behind a gap shares the gap's."""
    misses: dict[MissReason, int] = {}
    gap = whys.get(run)
    for i in range(run, asked):
        if (reason := whys.get(i, gap)) is not None:
            misses[reason] = misses.get(reason, 0) + 1
    return misses
