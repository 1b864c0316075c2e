"""Host memory: one buffer a frame. The core keeps the byte budget; this keeps the bytes.

A write hands its buffer over and copies nothing; a read copies. Discarding drops the buffer instead of
reusing it: a reader that is still copying keeps it alive, so it copies the block it was asked for or is told
that its reference is stale, and never sees another block's bytes. Frames of one size go back and forth
through the allocator's free lists, which costs no page fault in the steady state.
"""

from __future__ import annotations

import numpy as np

from kvstore import failpoints
from kvstore.nouns import Tier
from kvstore.tiers.base import Place
from kvstore.tiers.copying import beside_the_loop, corrupted, join


class HostTier:
    tier = Tier.HOST

    def __init__(self) -> None:
        self._frames: dict[int, tuple[int, memoryview]] = {}  # slot -> generation, frame
        self._nbytes = 0

    def allocate(self, nbytes: int) -> memoryview:
        return np.empty(nbytes, dtype=np.uint8).data

    def give_up(self, frame: memoryview) -> None:
        """The allocator has it back as soon as nobody holds it."""

    async def write(self, place: Place, frame: memoryview) -> None:
        if await failpoints.hit("storage.write") is failpoints.Effect.DROP:
            return
        kept = self._frames.get(place.slot)
        if kept is not None and kept[0] >= place.generation:
            return  # late: these bytes are here, or the slot was given to somebody else meanwhile
        if kept is not None:
            self._nbytes -= kept[1].nbytes
        self._frames[place.slot] = place.generation, frame
        self._nbytes += frame.nbytes

    async def read(self, place: Place) -> memoryview | None:
        frame = await self.borrow(place)
        return None if frame is None else await beside_the_loop(frame.nbytes, lambda: join(frame))

    async def borrow(self, place: Place) -> memoryview | None:
        frame = self._find(place)
        if frame is None:
            return None
        effect = await failpoints.hit("storage.read")
        if effect is failpoints.Effect.DROP:
            return None
        return corrupted(frame) if effect is failpoints.Effect.CORRUPT else frame

    def give_back(self, frame: memoryview) -> None:
        """Whoever holds a frame keeps it alive."""

    def discard(self, place: Place) -> None:
        frame = self._find(place)
        if frame is not None:
            del self._frames[place.slot]
            self._nbytes -= frame.nbytes

    def leave(self, place: Place) -> None:
        self.discard(place)

    async def sync(self) -> None:
        """Host memory promises nothing across a crash: there is nothing to wait for."""

    def nbytes(self) -> int:
        return self._nbytes

    def flip_byte(self, place: Place, offset: int) -> bool:
        frame = self._find(place)
        if frame is not None:
            frame[offset] ^= 1
        return frame is not None

    def _find(self, place: Place) -> memoryview | None:
        generation, frame = self._frames.get(place.slot, (0, None))
        return frame if generation == place.generation else None
