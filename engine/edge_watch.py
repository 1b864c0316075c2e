"""What the store's shards delete or drop, told to a worker's edge shard: it must not outlive that in a pool.

One watch over all namespaces that the worker has open, on every shard, resumed where it ended. A purge of a
namespace or of our epoch is carried out here; a change of epochs has the store asked for its table, which
ours then follows. Where a gap cannot be excluded (a shard's first word, a restart, a history that was
compacted) everything kept is forgotten: a miss is legal. Told, not asked: between a purge and its news lies
the watch's delay, a few milliseconds, or as long as a shard is out of reach. A purge of single keys looks
like an eviction there and is not followed; `forget` empties a pool at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import structlog

from engine.edge import EdgeShard
from engine.store_link import StoreLink
from kvstore.errors import KVStrataError
from kvstore.merged_watch import Changed, Resync, Watch
from kvstore.nouns import Change, ChangeKind, Revision, ShardId

__all__ = ["EdgeWatch"]

RETRY_S: Final = 1.0

log = structlog.get_logger(__name__)


class EdgeWatch:
    """One worker's, on its event loop. Counted by the edge shard: "edge:purged", "edge:resynced"."""

    def __init__(self, edge: EdgeShard, store: StoreLink) -> None:
        self._edge = edge
        self._store = store
        self._seen: dict[ShardId, Revision] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="watch the store for the pool")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        """A watch lasts until it ends by itself or a namespace is opened that it does not cover."""
        while True:
            self._edge.opened.clear()
            watch = self._store.watch(self._edge.namespaces(), self._seen)
            if watch is None:
                await self._edge.opened.wait()
                continue
            following = asyncio.create_task(self._follow(watch))
            another = asyncio.create_task(self._edge.opened.wait())
            try:
                await asyncio.wait({following, another}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (following, another):
                    task.cancel()
                ended = await asyncio.gather(following, another, return_exceptions=True)
                await watch.close()
            if isinstance(ended[0], Exception):
                log.warning("the watch for the pool failed, and is begun again", error=str(ended[0]))
                self._seen.clear()
                await asyncio.sleep(RETRY_S)

    async def _follow(self, watch: Watch) -> None:
        async for event in watch:
            if isinstance(event, Changed):
                if event.shard not in self._seen:
                    self._edge.counters["edge:resynced"] += await self._edge.empty()
                    await self._follow_epochs()
                for change in event.changes:
                    await self._obey(change)
            elif isinstance(event, Resync):
                await self._resync()
            else:
                continue  # silent: it tells when it is back
            # Only now: whoever is cancelled before it hears of the change again.
            self._seen[event.shard] = event.revision

    async def _resync(self) -> None:
        self._edge.counters["edge:resynced"] += await self._edge.forget()
        await self._follow_epochs()

    async def _obey(self, change: Change) -> None:
        if change.kind is ChangeKind.PURGED and change.epoch in (0, self._edge.epoch.number):
            self._edge.counters["edge:purged"] += await self._edge.forget(change.namespace)
        elif change.kind is ChangeKind.EPOCH:
            await self._follow_epochs()

    async def _follow_epochs(self) -> None:
        try:
            known = await self._store.epochs()
        except KVStrataError as error:
            log.info("not every shard said which epochs it knows", error=str(error))
            return
        for epochs in known.values():
            self._edge.follow(epochs)
