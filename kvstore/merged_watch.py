"""Changes of all shards in one stream: each shard's in its own order, without gaps; none between shards.

    Changed(shard, revision, changes)   in revision order. The first of a shard comes at once, maybe empty
    Resync(shard, revision)             what came before is not known there (compacted, or it restarted): list
                                        that shard, then go on; what comes after `revision` follows
    Silent(shard, error)                it does not answer; it is asked again until it does

`seen` is the place to resume from: the last revision of each shard whose event was handed out. A reader that
is slow holds up the shards' streams, and nobody else; one too slow gets a Resync, never a gap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from kvstore.deadline import Deadline
from kvstore.errors import Compacted, KVStrataError, NotFound
from kvstore.nouns import Change, NamespaceId, Revision, ShardId
from kvstore.peers import Peers
from kvstore.transport.base import ShardTransport

EVENTS_AHEAD: Final = 64
RETRY_S: Final = (0.1, 2.0)  # the first wait before a silent shard is asked again, and the longest


@dataclass(frozen=True, slots=True)
class Changed:
    shard: ShardId
    revision: Revision
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Resync:
    shard: ShardId
    revision: Revision


@dataclass(frozen=True, slots=True)
class Silent:
    shard: ShardId
    error: KVStrataError


WatchEvent = Changed | Resync | Silent
Reopen = Callable[[ShardTransport], Awaitable[None]]
"""Has a shard that forgot the namespaces open them again."""


class Watch:
    """`async with client.watch([namespace]) as watch: async for event in watch: ...`"""

    def __init__(
        self,
        peers: Peers,
        namespaces: Sequence[NamespaceId],
        after: Mapping[ShardId, Revision] | None,
        reopen: Reopen,
        for_s: float,
    ) -> None:
        self.seen: dict[ShardId, Revision] = dict(after or {})
        self._peers = peers
        self._namespaces = tuple(namespaces)
        self._resumed = after is not None
        self._reopen = reopen
        self._for_s = for_s
        self._events: asyncio.Queue[WatchEvent | None] = asyncio.Queue(EVENTS_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> WatchEvent:
        if not self._tasks:
            self._start()
        event = await self._events.get()
        if event is None:
            await self.close()
            raise StopAsyncIteration
        if not isinstance(event, Silent):
            self.seen[event.shard] = event.revision
        return event

    # -- inside ------------------------------------------------------------------------------------

    def _start(self) -> None:
        deadline = Deadline(self._for_s)
        followers = [
            asyncio.create_task(self._follow(shard, deadline), name=f"watch-{shard}")
            for shard in self._peers.transports
        ]
        self._tasks = [*followers, asyncio.create_task(self._end(followers), name="watch-end")]

    async def _end(self, followers: list[asyncio.Task[None]]) -> None:
        try:
            await asyncio.gather(*followers)
        finally:
            await self._events.put(None)

    async def _follow(self, shard: ShardId, deadline: Deadline) -> None:
        after = self.seen.get(shard)
        resync = self._resumed and after is None  # a shard that joined: nobody has listed it yet
        silent, wait_s, fresh = False, RETRY_S[0], True
        while deadline.left() > 0:
            try:
                transport = self._peers.transport(shard)
                async for batch in transport.watch(self._namespaces, after, timeout_s=deadline.left()):
                    if resync:
                        await self._events.put(Resync(shard, batch.revision))
                    if batch.changes or ((fresh or silent) and not resync):
                        await self._events.put(Changed(shard, batch.revision, batch.changes))
                    after, resync, fresh, silent, wait_s = batch.revision, False, False, False, RETRY_S[0]
            except Compacted:
                after, resync = None, True
                continue  # at once: from now on cannot be compacted
            except NotFound as error:
                silent = await self._failed(shard, error, silent)
                await self._reopened(shard)
            except KVStrataError as error:
                silent = await self._failed(shard, error, silent)
            await asyncio.sleep(min(wait_s, deadline.left()))
            wait_s = min(RETRY_S[1], 2 * wait_s)

    async def _failed(self, shard: ShardId, error: KVStrataError, told: bool) -> bool:
        if not told:
            await self._events.put(Silent(shard, error))
        return True

    async def _reopened(self, shard: ShardId) -> None:
        try:
            await self._reopen(self._peers.transport(shard))
        except KVStrataError:
            return  # it is asked again, and told of as silent already
