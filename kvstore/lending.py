"""A shard's frames lent to whoever sends them: packed from where they lie, without a copy in between.

A lent frame stays what it is until it is given back, even if its version is evicted meanwhile: its memory
goes to nobody else. What is lent at one time is bounded by the streams a shard serves, one message each.
"""

from __future__ import annotations

from kvstore.driver import ShardDriver
from kvstore.nouns import BlockRef, MissReason, NamespaceId
from kvstore.tiers.base import Place


class Lent:
    """Frames of one namespace lent together; whoever makes one gives them back, however it ends."""

    __slots__ = ("_driver", "_frames", "_namespace")

    def __init__(self, driver: ShardDriver, namespace: NamespaceId) -> None:
        self._driver = driver
        self._namespace = namespace
        self._frames: list[memoryview] = []

    async def borrow(self, ref: BlockRef) -> memoryview | MissReason:
        """The frame a reference means, to be read only; or why it is not served. Raises Unavailable."""
        driver = self._driver
        core = driver.serving()
        if not core.index.serves(self._namespace, ref):
            return core.missed(MissReason.STALE_REFERENCE)
        try:
            frame = await driver.tiers.borrow(Place(ref.slot, ref.generation))
        except OSError as error:
            return driver.failed_to_read(error)
        if frame is None:
            again = core.resolve(self._namespace, ref)
            return again if isinstance(again, MissReason) else driver.lost(again)
        self._frames.append(frame)
        return frame

    def give_back(self, count: int | None = None) -> None:
        """The first `count` of those that are lent; all of them unless said."""
        given, self._frames = self._frames[:count], self._frames[len(self._frames[:count]) :]
        for frame in given:
            self._driver.tiers.give_back(frame)
