"""A shard's storage: the host's, and below it a tier that survives, if there is one.

Writers' frames go to the host. Whoever reads gets a frame from the fastest tier that has it; it is the same frame on
each. What the core gives up on one tier alone is discarded there alone.
"""

from __future__ import annotations

from kvstore.core.rooms import Freed
from kvstore.nouns import Tier
from kvstore.tiers.base import Place, TierStorage
from kvstore.tiers.durable import DurableTier


class Hierarchy:
    tier = Tier.HOST

    def __init__(self, host: TierStorage, durable: DurableTier) -> None:
        self.host = host
        self.durable = durable

    def allocate(self, nbytes: int) -> memoryview:
        return self.host.allocate(nbytes)

    def give_up(self, frame: memoryview) -> None:
        self.host.give_up(frame)

    async def write(self, place: Place, frame: memoryview) -> None:
        await self.host.write(place, frame)

    async def read(self, place: Place) -> memoryview | None:
        frame = await self.host.read(place)
        return frame if frame is not None else await self.durable.read(place)

    async def borrow(self, place: Place) -> memoryview | None:
        frame = await self.host.borrow(place)
        return frame if frame is not None else await self.durable.borrow(place)

    def give_back(self, frame: memoryview) -> None:
        self.host.give_back(frame)
        self.durable.give_back(frame)

    def discard(self, place: Place) -> None:
        self.host.discard(place)
        self.durable.discard(place)

    def leave(self, place: Place) -> None:
        self.host.leave(place)

    def free(self, freed: Freed) -> None:
        """What the core does not need any more, where it does not."""
        place = Place(freed.ref.slot, freed.ref.generation)
        if freed.tier is Tier.NVME:
            self.durable.discard(place)
            if not freed.lives_on:
                self.host.discard(place)  # readers past the shard were told to ask it
        elif freed.lives_on:
            self.host.leave(place)
        else:
            self.host.discard(place)

    async def sync(self) -> None:
        await self.durable.sync()

    def nbytes(self) -> int:
        return self.host.nbytes()
