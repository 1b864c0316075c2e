"""A shard's storage: the host's, and below it a tier that survives, if there is one.

Writers' frames go to the host. Whoever reads gets a frame from the fastest tier that has it; it is the same
frame on each. What the core gives up on one tier alone is discarded there alone.
"""

from __future__ import annotations

from kvstore.core.index import Index
from kvstore.core.rooms import Freed
from kvstore.core.versions import WRITTEN
from kvstore.nouns import Tier
from kvstore.tiers.base import Place, TierStorage
from kvstore.tiers.durable import DurableTier


class Tiers:
    def __init__(self, host: TierStorage, durable: DurableTier | None = None) -> None:
        self.host = host
        self.durable = durable

    async def read(self, place: Place) -> memoryview | None:
        """A copy that the caller owns; None when the place holds nothing. Raises OSError."""
        frame = await self.host.read(place)
        if frame is None and self.durable is not None:
            frame = await self.durable.read(place)
            if frame is None:  # it may have moved up and left while we asked below
                frame = await self.host.read(place)
        return frame

    async def borrow(self, place: Place) -> memoryview | None:
        """The frame, to be read only, until `give_back`. Raises OSError."""
        frame = await self.host.borrow(place)
        if frame is None and self.durable is not None:
            frame = await self.durable.borrow(place)
            if frame is None:
                frame = await self.host.borrow(place)
        return frame

    def give_back(self, frame: memoryview) -> None:
        self.host.give_back(frame)
        if self.durable is not None:
            self.durable.give_back(frame)

    def free(self, freed: Freed) -> None:
        """What the core does not need any more, where it does not."""
        place = Place(freed.ref.slot, freed.ref.generation)
        if freed.tier is Tier.NVME and self.durable is not None:
            self.durable.discard(place)
        if freed.tier is Tier.HOST and freed.lives_on:
            self.host.leave(place)
        elif not freed.lives_on:
            self.host.discard(place)  # or what tells readers past the shard to ask it

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
