"""A shard's storage: the host's, and below it a tier that survives, if there is one.

Writers' frames go to the host. Whoever reads gets a frame from the fastest tier that has it; it is the same
frame on each. What the core gives up on one tier alone is discarded there alone.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Final

from kvstore.core.index import Index
from kvstore.core.rooms import Freed
from kvstore.core.versions import WRITTEN, State
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockKey, Tier
from kvstore.tiers.base import Breakable, Place, TierStorage, place_of
from kvstore.tiers.durable import DurableTier

LOOKS_MAX: Final = 8


class Tiers:
    def __init__(self, host: TierStorage, durable: DurableTier | None = None) -> None:
        self.host = host
        self.durable = durable
        self._departures = 0  # of versions that left a tier and live on

    async def read(self, place: Place) -> memoryview | None:
        """A copy that the caller owns; None when the place holds nothing. Raises OSError."""
        return await self._found(lambda storage: storage.read(place))

    async def borrow(self, place: Place) -> memoryview | None:
        """The frame, to be read only, until `give_back`. Raises OSError."""
        return await self._found(lambda storage: storage.borrow(place))

    def give_back(self, frame: memoryview) -> None:
        self.host.give_back(frame)
        if self.durable is not None:
            self.durable.give_back(frame)

    def free(self, freed: Freed) -> None:
        """What the core does not need any more, where it does not."""
        place = place_of(freed.ref)
        self._departures += freed.lives_on
        if freed.tier is Tier.NVME and self.durable is not None:
            self.durable.discard(place)
        if freed.tier is Tier.HOST and freed.lives_on:
            self.host.leave(place)
        elif not freed.lives_on:
            self.host.discard(place)  # or what tells readers past the shard to ask it

    async def _found(self, look: Callable[[TierStorage], Awaitable[memoryview | None]]) -> memoryview | None:
        """Whatever moves meanwhile: what was up while we looked below, or left while we looked above, is
        looked for again, so that nothing is answered None that lies somewhere."""
        for _ in range(LOOKS_MAX):
            departures = self._departures
            frame = await look(self.host)
            if frame is None and self.durable is not None:
                frame = await look(self.durable)
            if frame is not None or departures == self._departures:
                return frame
        raise OSError(errno.EBUSY, f"a frame went on moving while it was looked for {LOOKS_MAX} times")

    def flip_stored_byte(self, index: Index) -> BlockKey | None:
        """Flip one payload byte of a live block that begins a chain; its key. None: no such block on a tier
        that can be broken."""
        heads = (v for v in index.rows() if v.state is State.LIVE and not v.chain_index)
        victim = next(heads, None)
        if victim is None or not isinstance(self.host, Breakable):
            return None
        place = place_of(victim.ref)
        return victim.key if self.host.flip_byte(place, (HEADER_NBYTES + victim.nbytes) // 2) else None

    def check_integrity(self, index: Index) -> None:
        """Each tier holds just what the core knows to lie there. Raises AssertionError. Nothing may be on its
        way."""
        below = [(index.nvme, self.durable)] if self.durable is not None else []
        table = index.versions
        for room, storage in [(index.host, self.host), *below]:
            there = [slot for slot in index.slots() if table.residences[slot] & room.held]
            written = sum(table.nbytes[slot] for slot in there if table.written[slot] & WRITTEN)
            stored = storage.nbytes()
            assert stored == written, f"{stored} bytes stored on {room.tier.name}, {written} written"
