"""A shard's frames lent to whoever sends them: packed from where they lie, without a copy in between.

A lent frame stays what it is until it is given back, even if its version is evicted meanwhile: its memory
goes to nobody else. What is lent at one time is bounded by the streams a shard serves, one frame each.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from kvstore.driver import ShardDriver
from kvstore.nouns import BlockRef, MissReason, NamespaceId
from kvstore.tiers.base import Place


@contextlib.asynccontextmanager
async def lent(
    driver: ShardDriver, namespace: NamespaceId, ref: BlockRef
) -> AsyncIterator[memoryview | MissReason]:
    """The frame a reference means, to be read only; or why it is not served. Raises Unavailable."""
    version = driver.serving().resolve(namespace, ref)
    if isinstance(version, MissReason):
        yield version
        return
    try:
        frame = await driver.tiers.borrow(Place(ref.slot, ref.generation))
    except OSError as error:
        yield driver.failed_to_read(error)
        return
    if frame is None:
        again = driver.core.resolve(namespace, ref)
        yield again if isinstance(again, MissReason) else driver.lost(again)
        return
    try:
        yield frame
    finally:
        driver.tiers.give_back(frame)
