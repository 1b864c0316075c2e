"""Who watches a shard, on the driver's side: a turn of the loop after every change, in revision order.

A watcher costs what it is told; one that reads slowly reads from the shard's bounded log, and is told
Compacted when it has fallen behind that. Nothing is queued for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final

from kvstore.core.shard import ShardCore
from kvstore.errors import Unavailable
from kvstore.nouns import NamespaceId, Revision
from kvstore.transport.base import WatchBatch

BATCH_CHANGES: Final = 2_048


class Watchers:
    def __init__(self, core: ShardCore, batch_changes: int = BATCH_CHANGES) -> None:
        self._core = core
        self._batch_changes = batch_changes
        self._told = core.revision
        self._moved = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """End every watch: Unavailable."""
        self._closed = True
        self._moved.set()

    def wake(self) -> None:
        """The core may have changed."""
        if self._core.revision != self._told:
            self._told = self._core.revision
            self._moved.set()
            self._moved = asyncio.Event()

    async def watch(
        self, namespaces: Sequence[NamespaceId], after: Revision | None, timeout_s: float
    ) -> AsyncIterator[WatchBatch]:
        """The first batch comes at once, the last one when time is up; both may be without changes.

        Raises NotFound for a namespace that is not open, Compacted, and Unavailable once the shard is closed.
        """
        for namespace in namespaces:
            self._core.namespace(namespace)
        chosen, end = frozenset(namespaces), asyncio.get_running_loop().time() + timeout_s
        started = False
        while True:
            if self._closed:
                raise Unavailable("the shard was closed: ask the topology who took over")
            moved, newest = self._moved, self._core.revision
            upto, changes = self._core.past.changed_since(after, chosen, self._batch_changes)
            in_time = True
            if changes or not started:
                yield WatchBatch(upto, tuple(changes))
            elif upto.counter == newest:
                in_time = await _set_before(moved, end)
            started, after = True, upto
            if not in_time:
                yield WatchBatch(upto, ())
                return


async def _set_before(event: asyncio.Event, end: float) -> bool:
    try:
        async with asyncio.timeout_at(end):
            await event.wait()
    except TimeoutError:
        return False
    return True
