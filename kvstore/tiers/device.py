"""An engine's paged pool as a tier: blocks lie in the engine's slots, in the layout its kernels like.

    engine fills a slot -> keep(place, slot, meta)      nothing is copied: the slot now has a name
    match -> lend(places) -> slots                      used in place by any number of sequences
    read, borrow                                        a frame is made when a block leaves the pool
    set_aside -> allocate -> write                      and was checked when one enters (by the driver)

A frame is made from the slot by one strided copy and one xxh3 pass (1.5 MB: about 0.5 ms, in a thread). While
it is made the slot is lent, so that it cannot change hands: what leaves is what was named, even if its
version is evicted meanwhile. Writing raises OSError (ENOSPC) unless a slot was set aside for it: running
sequences come first, and nobody writes into a pool unasked. Nothing is promised of the bytes between: the
pool is the engine's own memory, as trusted as its weights.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import failpoints
from kvstore.frame import HEADER_NBYTES, decode_header, encode_header
from kvstore.nouns import BlockMeta, Tier
from kvstore.tiers.base import Place
from kvstore.tiers.copying import corrupted, to_its_end
from kvstore.tiers.pool_slots import PoolSlots

__all__ = ["DeviceTier", "PagedPool"]

Bytes = npt.NDArray[np.uint8]


class PagedPool(Protocol):
    """An engine's memory for KV, a block a slot. A full slot that is kept or lent is never written to."""

    @property
    def block_nbytes(self) -> int: ...

    def copy_out(self, slot: int, out: Bytes) -> None:
        """One block in the frame's layout into `out`, uint8 [block_nbytes]. From any thread."""
        ...

    def write_block(self, slot: int, payload: memoryview | Bytes) -> None:
        """Fill a slot. From any thread, as long as the slot is nobody else's."""
        ...


class DeviceTier:
    """One event loop's, but for the copies. See the module."""

    tier = Tier.DEVICE

    def __init__(self, pool: PagedPool, slots: PoolSlots) -> None:
        self._pool = pool
        self._slots = slots
        self._blocks: dict[int, tuple[int, int, BlockMeta]] = {}  # slot -> generation, the pool's, identity
        self._aside: list[int] = []  # the pool's, for blocks that are about to arrive

    # -- in place ----------------------------------------------------------------------------------

    def keep(self, place: Place, slot: int, meta: BlockMeta) -> None:
        """Name the full block that a running sequence has in `slot`. It stays when the sequence goes."""
        assert place.slot not in self._blocks, f"place {place} is taken"
        self._slots.keep(slot)
        self._blocks[place.slot] = place.generation, slot, meta

    def lend(self, places: Iterable[Place]) -> list[int]:
        """The pool's slots of these places, each with one more user; `PoolSlots.give_back` ends that. The
        places must hold blocks: whoever asks has just pinned them."""
        slots = [self._blocks[place.slot][1] for place in places]
        self._slots.lend(slots)
        return slots

    def set_aside(self, n: int) -> int:
        """Take up to `n` free slots of the pool for blocks that arrive; how many. `write` takes no others:
        what is free is the engine's to count on."""
        taken = self._slots.take_kept(n)
        self._aside += taken
        return len(taken)

    def put_back(self) -> None:
        """What was set aside and not written to is free again."""
        while self._aside:
            self._slots.drop(self._aside.pop())

    def kept_slots(self) -> set[int]:
        """Those with a block, and those set aside for one: what a check of conservation holds the pool's own
        count against."""
        return {*(slot for _, slot, _ in self._blocks.values()), *self._aside}

    # -- TierStorage -------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> memoryview:
        return np.empty(nbytes, dtype=np.uint8).data

    def give_up(self, frame: memoryview) -> None:
        """The allocator has it back as soon as nobody holds it."""

    async def write(self, place: Place, frame: memoryview) -> None:
        if await failpoints.hit("storage.write") is failpoints.Effect.DROP:
            return
        known = self._blocks.get(place.slot)
        if known is not None and known[0] >= place.generation:
            return  # late: these bytes are here, or the slot was given to somebody else meanwhile
        meta = decode_header(frame).meta
        if not self._aside:
            raise OSError(errno.ENOSPC, "no slot of the pool was set aside for blocks from elsewhere")
        slot = self._aside.pop()
        payload = frame[HEADER_NBYTES:]
        await to_its_end(
            frame.nbytes,
            lambda: self._pool.write_block(slot, payload),
            lambda: self._slots.drop(slot),
        )
        known = self._blocks.get(place.slot)
        if known is not None and known[0] >= place.generation:
            self._slots.drop(slot)  # the same frame came twice, or the place was named meanwhile
            return
        self._blocks[place.slot] = place.generation, slot, meta

    async def read(self, place: Place) -> memoryview | None:
        return await self.borrow(place)

    async def borrow(self, place: Place) -> memoryview | None:
        """A frame made for the caller: nothing to give back but its memory."""
        found = self._find(place)
        if found is None:
            return None
        effect = await failpoints.hit("storage.read")
        if effect is failpoints.Effect.DROP or self._find(place) is None:
            return None
        slot, meta = found
        self._slots.lend((slot,))
        nbytes = HEADER_NBYTES + self._pool.block_nbytes
        frame = await to_its_end(
            nbytes, lambda: self._frame(slot, meta), lambda: self._slots.give_back((slot,))
        )
        self._slots.give_back((slot,))
        return corrupted(frame) if effect is failpoints.Effect.CORRUPT else frame

    def give_back(self, frame: memoryview) -> None:
        """Whoever holds a frame keeps it alive."""

    def leave(self, place: Place) -> None:
        self.discard(place)

    def discard(self, place: Place) -> None:
        found = self._find(place)
        if found is not None:
            del self._blocks[place.slot]
            self._slots.drop(found[0])

    async def sync(self) -> None:
        """Device memory promises nothing across a crash: there is nothing to wait for."""

    def nbytes(self) -> int:
        return len(self._blocks) * (HEADER_NBYTES + self._pool.block_nbytes)

    # -- inside ------------------------------------------------------------------------------------

    def _find(self, place: Place) -> tuple[int, BlockMeta] | None:
        generation, slot, meta = self._blocks.get(place.slot, (0, 0, None))
        return (slot, meta) if meta is not None and generation == place.generation else None

    def _frame(self, slot: int, meta: BlockMeta) -> memoryview:
        frame: Bytes = np.empty(HEADER_NBYTES + self._pool.block_nbytes, np.uint8)
        self._pool.copy_out(slot, frame[HEADER_NBYTES:])
        header = encode_header(meta, frame[HEADER_NBYTES:].data)
        frame[:HEADER_NBYTES] = np.frombuffer(header, np.uint8)
        return frame.data
