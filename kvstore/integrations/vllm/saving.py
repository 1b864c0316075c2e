"""Saves: full blocks out of vLLM's pool at the end of the step that filled them, and into the store later.

    vLLM's thread   save() -> slots of staging -> one strided copy -> the request's queue
    loop            queue -> keys -> publish, a few blocks at a time -> slots given back

The copy is all that vLLM waits for. What finds no room, store or place is dropped and counted, and with it
the rest of its request: nobody could reach a block behind a gap. A publish is bounded by `save_timeout_s`;
there are at most `_PUBLISHES_MAX` at a time, and as many blocks waiting as staging holds.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from kvstore.answers import PublishBlock
from kvstore.errors import KVStrataError
from kvstore.hashing import STRIPE_BLOCKS
from kvstore.integrations.vllm.conversion import Pool
from kvstore.integrations.vllm.copies import Copies
from kvstore.integrations.vllm.floor import Floor
from kvstore.integrations.vllm.keys import chain_keys, tokens_of
from kvstore.integrations.vllm.plans import Save
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.staging import Staging
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.integrations.vllm.tallies import Tallies
from kvstore.nouns import ROOT_KEY, BlockKey, PinnedBlock, Quality, Refusal
from kvstore.session import StoreSession
from kvstore.tiers.copying import all_done

__all__ = ["Saver"]

log = structlog.get_logger(__name__)

_BATCH_BLOCKS: Final = 32
_PUBLISHES_MAX: Final = 8
_CHAINS_MAX: Final = 65_536
_WAITING_MAX: Final = 16_384
"""Saves that wait, of all requests: one of blocks that need not be saved holds no slot, only tokens."""
_STILL_REACHABLE: Final = frozenset({Refusal.EXISTS, Refusal.STAGED})
"""Refusals behind which the chain goes on: somebody else has stored the block, or is about to."""


@dataclass(slots=True)
class _Copied:
    """A save whose blocks lie in staging, the first of them where `save.wanted` is."""

    save: Save
    slots: list[int]
    quality: Quality
    wait: Callable[[], None] | None  # until it lies there


@dataclass(slots=True)
class _Chain:
    """One request's. `end` is vLLM's thread's, `keys` the loop's, `waiting` under the saver's lock."""

    end: int = 0  # tokens of its saves
    is_cut: bool = False  # nothing behind what was copied can be reached
    is_broken: bool = False  # nor what was
    keys: list[BlockKey] = field(default_factory=list)
    waiting: deque[_Copied] = field(default_factory=deque)
    is_draining: bool = False


class Saver:
    """One worker's. `counters` of the tallies: saved_blocks, which the store has now, whoever wrote them;
    refused_blocks by its reason; dropped_blocks by what they found none of: room, store, order, lineage, or
    chain, which is what one of the others, or a refusal, takes with it."""

    def __init__(
        self, setup: Setup, store: StoreSide, pool: Pool, copies: Copies, floor: Floor, tallies: Tallies,
        staging: Staging,
    ) -> None:  # fmt: skip
        self._setup, self._store = setup, store
        self._pool, self._copies, self._staging = pool, copies, staging
        self._floor, self._tallies = floor, tallies
        self._size = setup.layout.block_tokens
        self._chains: dict[str, _Chain] = {}
        self._waiting = 0
        self._lock = threading.Lock()
        self._turns = asyncio.Semaphore(_PUBLISHES_MAX)

    # -- vLLM's thread -----------------------------------------------------------------------------

    def forget(self, request_id: str) -> None:
        """What was copied is published all the same."""
        self._chains.pop(request_id, None)

    def save(self, saves: Sequence[Save]) -> None:
        """Copy out what the step has filled. Never waits for the store."""
        for save in saves:
            chain = self._chain_of(save)
            if save.begin != chain.end:
                chain.is_cut = True
                self._dropped("order", (save.end - save.wanted) // self._size)
            elif chain.is_cut or chain.is_broken:
                self._dropped("chain", (save.end - save.wanted) // self._size)
            else:
                chain.is_cut = not self._copy(chain, save)
            chain.end = save.end

    def _chain_of(self, save: Save) -> _Chain:
        chain = self._chains.get(save.request_id)
        if chain is None or save.begin == 0:
            chain = self._chains[save.request_id] = _Chain()
            if len(self._chains) > _CHAINS_MAX:
                del self._chains[next(iter(self._chains))]
        return chain

    def _copy(self, chain: _Chain, save: Save) -> bool:
        """False: nothing that follows can be reached."""
        blocks = (save.end - save.wanted) // self._size
        quality = self._floor.publishable(save.epoch)
        if quality is None:
            return self._dropped("lineage", blocks)
        if self._waiting >= _WAITING_MAX:
            return self._dropped("room", blocks)
        slots = self._staging.take(blocks)
        room = len(slots)
        try:
            end = save.wanted + room * self._size
            pieces = self._pool.pieces(save.block_ids, save.wanted, end, slots)
            wait = self._copies.out(pieces, self._staging.memory)
        except BaseException:
            self._staging.give_back(slots)
            raise
        with self._lock:
            self._waiting += 1
            chain.waiting.append(_Copied(save, slots, quality, wait))
            begins, chain.is_draining = not chain.is_draining, True
        if begins:
            self._store.begin(self._drain(chain))
        return room == blocks or self._dropped("room", blocks - room)

    def _dropped(self, found_no: str, blocks: int) -> bool:
        self._tallies.count(f"dropped_blocks:{found_no}", blocks)
        return False

    # -- the loop ----------------------------------------------------------------------------------

    async def _drain(self, chain: _Chain) -> None:
        """Publish what the request has waiting, in order; one task a request."""
        try:
            while (copied := self._next(chain)) is not None:
                try:
                    await self._publish(chain, copied)
                except BaseException:
                    self._dropped("store", len(copied.slots))
                    raise
                finally:
                    self._staging.give_back(copied.slots)
        except BaseException:
            chain.is_broken = True
            while (copied := self._next(chain)) is not None:
                self._dropped("chain", len(copied.slots))
                self._staging.give_back(copied.slots)
            raise

    def _next(self, chain: _Chain) -> _Copied | None:
        with self._lock:
            if not chain.waiting:
                chain.is_draining = False
                return None
            self._waiting -= 1
            return chain.waiting.popleft()

    async def _publish(self, chain: _Chain, copied: _Copied) -> None:
        """Gives slots back as it goes; `copied` keeps those that it did not get to."""
        save, size, slots = copied.save, self._size, copied.slots
        if copied.wait is not None:
            await all_done([asyncio.get_running_loop().run_in_executor(None, copied.wait)])
        if chain.is_broken:
            self._dropped("chain", len(slots))
            return
        session = await self._session(save)
        if session is None:
            chain.is_broken = True
            self._dropped("store", len(slots))
            return
        parent = chain.keys[-1] if chain.keys else ROOT_KEY
        chain.keys += chain_keys(session.namespace, tokens_of(save.token_ids), size, save.salt, parent)
        first = save.wanted // size
        while slots and not chain.is_broken:
            batch = slots[:_BATCH_BLOCKS]
            async with self._turns:
                stored = await self._publish_some(session, chain, copied, first, batch)
            del slots[: len(batch)]
            self._staging.give_back(batch)
            if stored:
                self._tallies.stored(save.request_id, first * size, (first + stored) * size)
            first += len(batch)
        self._dropped("chain", len(slots))

    async def _session(self, save: Save) -> StoreSession | None:
        try:
            return await self._store.session(self._setup.spec_of(self._setup.rank, save.adapter), save.epoch)
        except KVStrataError as error:
            log.warning("nothing can be saved", epoch=save.epoch.number, error=str(error))
            return None

    async def _publish_some(
        self, session: StoreSession, chain: _Chain, copied: _Copied, first: int, slots: Sequence[int]
    ) -> int:
        """How many blocks of the batch, from its first on, are in the store now. Breaks the chain where one
        that nobody has stored is not."""
        keys, save, began = chain.keys, copied.save, self._store.clock.now()
        blocks = [
            PublishBlock(
                keys[index],
                keys[index - 1] if index else ROOT_KEY,
                index,
                keys[index - index % STRIPE_BLOCKS],
                self._staging.payload(slot),
            )
            for index, slot in enumerate(slots, first)
        ]
        try:
            published = await session.publish(
                blocks,
                quality=copied.quality,
                owner=save.request_id,
                pin_for_s=save.pin_for_s,
                timeout_s=self._setup.config.save_timeout_s,
            )
        except KVStrataError as error:
            log.warning("blocks were not saved", blocks=len(blocks), error=str(error))
            chain.is_broken = True
            self._dropped("store", len(blocks))
            return 0
        self._tallies.took("publish", self._store.clock.now() - began)
        return self._judged(chain, published.blocks)

    def _judged(self, chain: _Chain, answers: Sequence[PinnedBlock | Refusal]) -> int:
        stored = len(answers)
        self._tallies.count("saved_blocks", sum(not isinstance(answer, Refusal) for answer in answers))
        for index, answer in reversed([*enumerate(answers)]):
            if not isinstance(answer, Refusal):
                continue
            if answer is not Refusal.EXISTS:
                stored = index
            self._tallies.count(f"refused_blocks:{answer.value}")
            chain.is_broken = chain.is_broken or answer not in _STILL_REACHABLE
        return stored
