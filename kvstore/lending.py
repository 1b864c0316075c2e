"""A shard's frames lent to whoever sends them: packed from where they lie, without a copy in between.

A lent frame stays what it is until it is given back, even if its version is evicted meanwhile: its memory
goes to nobody else. What is lent at one time is bounded by the streams a shard serves, one message each.
Frames below the host are read ahead, a few at a time, while those before them are on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

from kvstore.driver import ShardDriver
from kvstore.nouns import BlockRef, MissReason, NamespaceId, Tier
from kvstore.tiers.base import place_of

AHEAD_FRAMES: Final = 8  # enough to keep a disk busy (benchmarks/nvme.py)


class Lent:
    """Frames of one namespace lent together; whoever makes one gives them back, however it ends."""

    __slots__ = ("_ahead", "_driver", "_frames", "_namespace", "_to_come")

    def __init__(self, driver: ShardDriver, namespace: NamespaceId, refs: Sequence[BlockRef]) -> None:
        """They are borrowed in the order of `refs`."""
        self._driver = driver
        self._namespace = namespace
        self._frames: list[memoryview] = []
        self._ahead: dict[BlockRef, asyncio.Future[memoryview | None]] = {}
        self._to_come: Iterator[BlockRef] = iter(refs if driver.tiers.durable is not None else ())

    async def borrow(self, ref: BlockRef) -> memoryview | MissReason:
        """The frame a reference means, to be read only; or why it is not served. Raises Unavailable."""
        driver = self._driver
        core = driver.serving()
        self._read_ahead()
        if not core.index.serves(self._namespace, ref):
            return core.missed(MissReason.STALE_REFERENCE)
        reading = self._ahead.pop(ref, None)
        try:
            frame = None if reading is None else await reading
            if frame is None:
                frame = await driver.tiers.borrow(place_of(ref))
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

    async def close(self) -> None:
        """Give all back, and read nothing ahead any more."""
        self.give_back()
        for reading in self._ahead.values():
            reading.cancel()
        for reading in self._ahead.values():
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await reading
        self._ahead.clear()

    def _read_ahead(self) -> None:
        index, durable = self._driver.core.index, self._driver.tiers.durable
        while durable is not None and len(self._ahead) < AHEAD_FRAMES:
            ref = next(self._to_come, None)
            if ref is None:
                return
            if (
                ref not in self._ahead
                and index.serves(self._namespace, ref)
                and index.versions.tiers[ref.slot] == Tier.NVME
            ):
                place = place_of(ref)
                self._ahead[ref] = asyncio.ensure_future(durable.borrow(place))
