"""A watcher: keeps an index of what one shard holds by listing it once and being told of each change.

Whatever goes wrong (streams cut off, revisions compacted away, the shard restarted), at a quiet moment the
index must be what the shard lists, to the entry. On the way: revisions come in order, none in pieces, and no
version appears twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.errors import Compacted, KVStrataError, NotFound
from kvstore.nouns import BlockKey, Change, ChangeKind, NamespaceId, Quality, Revision, Snapshot
from kvstore.transport.base import WatchBatch
from kvstore.transport.sim import SimTransport
from kvstore.transport.sim_host import SimHost
from tests.kvstore.oracle import SPEC, epoch
from tests.sim.writings import Broken

if TYPE_CHECKING:
    from tests.sim.world import World

PAGE = 6
TIMEOUT_S = 2.0

Entry = tuple[NamespaceId, BlockKey, int, int]  # of an epoch and a quality


class Mirror:
    def __init__(self, world: World, host: SimHost) -> None:
        self.world = world
        self.host = host
        self.index: dict[Entry, int] = {}  # on which tier, the fastest
        self.at: Revision | None = None
        self._transport = SimTransport(host, world.network)
        self._namespaces: list[NamespaceId] = []

    async def run(self) -> None:
        """For ever; at most one call or stream at a time."""
        while True:
            try:
                if self.at is None:
                    await self._list()
                await self._follow()
                self.world.report.ops["watch"] += 1
            except (Compacted, NotFound) as error:  # too far behind, or the shard restarted
                self.at = None
                self.world.report.reasons[f"watch:{type(error).__name__}"] += 1
                await asyncio.sleep(0.01)
            except KVStrataError:
                self.world.report.reasons["watch:cut off"] += 1
                await asyncio.sleep(0.1)

    async def _list(self) -> None:
        self.world.report.ops["list"] += 1
        transport, at = self._transport, None
        self._namespaces = [
            await transport.open_namespace(SPEC, tenant, timeout_s=TIMEOUT_S) for tenant in self.world.tenants
        ]
        index: dict[Entry, int] = {}
        for namespace in self._namespaces:
            cursor, first = 0, True
            while cursor or first:
                page = await transport.listing(namespace, at, cursor, PAGE, timeout_s=TIMEOUT_S)
                at, cursor, first = page.revision, page.next_cursor, False
                for row in page.versions:
                    entry = namespace, row.key, row.epoch.number, int(row.quality)
                    if entry in index or row.created > at.counter:
                        raise Broken(f"a listing at {at} names {row} twice, or too early")
                    index[entry] = int(row.tier)
        self.index, self.at = index, at

    async def _follow(self) -> None:
        assert self.at is not None
        floor = self.world.history.horizons.get(self.at.incarnation, 0)
        after = self.at.counter
        async for batch in self._transport.watch(
            self._namespaces, self.at, timeout_s=self.world.rng.uniform(1.0, 20.0)
        ):
            if after < floor:
                raise Broken(f"watched from {after}, compacted up to {floor}")
            self._check(batch)
            oldest = 0
            if any(change.kind is ChangeKind.EPOCH for change in batch.changes):
                oldest = (await self._transport.epochs(SPEC.model_id, timeout_s=TIMEOUT_S)).oldest
            for change in batch.changes:
                self._apply(change)
            self.index = {entry: tier for entry, tier in self.index.items() if entry[2] >= oldest}
            self.at = batch.revision
            if self.world.rng.random() < 0.1:
                await asyncio.sleep(self.world.rng.uniform(0.0, 3.0))  # a slow one

    def _check(self, batch: WatchBatch) -> None:
        at = self.at
        assert at is not None
        revisions = [change.revision for change in batch.changes]
        in_order = revisions == sorted(revisions) and len(set(batch.changes)) == len(batch.changes)
        last = revisions[-1] if revisions else batch.revision.counter
        if batch.revision.incarnation != at.incarnation or not in_order:
            raise Broken(f"after {at}: {batch} out of order")
        if batch.revision.counter < max(last, at.counter) or (revisions and revisions[0] <= at.counter):
            raise Broken(f"after {at}: {batch} tells in pieces, or twice")

    def _apply(self, change: Change) -> None:
        entry = change.namespace, change.key, change.epoch, change.quality
        if change.kind is ChangeKind.COMMITTED:
            if entry in self.index:
                raise Broken(f"{change} of a version that is there")
            self.index[entry] = change.tier
        elif change.kind is ChangeKind.MOVED and entry in self.index:  # else it is listed no more by now
            self.index[entry] = change.tier
        elif change.kind is ChangeKind.RETIRED:
            self.index.pop(entry, None)
        elif change.kind is ChangeKind.PURGED:
            self.index = {
                e: tier
                for e, tier in self.index.items()
                if e[0] != change.namespace or (change.epoch and e[2] != change.epoch)
            }

    async def check(self) -> None:
        """At a quiet moment. Raises Broken unless index, listing and what can be matched are one."""
        driver = self.host.driver
        listed: dict[Entry, int] = {}
        for namespace in self._namespaces:
            if namespace not in driver.core.index.spaces:
                continue
            cursor, first = 0, True
            while cursor or first:
                page = await driver.listing(namespace, None, cursor, 1 << 20, timeout_s=TIMEOUT_S)
                cursor, first = page.next_cursor, False
                for r in page.versions:
                    listed[namespace, r.key, r.epoch.number, int(r.quality)] = int(r.tier)
        if self.index != listed:
            raise Broken(
                f"the index of {self.host.shard} at {self.at}, revision {driver.core.revision} there: "
                f"{_names(self.index.keys() - listed.keys())} are not, "
                f"{_names(listed.keys() - self.index.keys())} are missing, "
                f"{_names({e for e in listed if self.index.get(e, listed[e]) != listed[e]})} lie elsewhere"
            )
        current = epoch(self.world.epoch)
        for namespace in self._namespaces:
            for key in self.world.chain(namespace, 0).keys:
                best = max(
                    (q for n, k, e, q in listed if (n, k, e) == (namespace, key, current.number)), default=0
                )
                seen = await self._seen(Snapshot(namespace, current, Quality.INT4), key)
                if seen != best:
                    raise Broken(f"listed at quality {best}, matched at {seen}: {key.hex()[:8]}")

    async def _seen(self, snapshot: Snapshot, key: BlockKey) -> int:
        """The quality a match finds; 0: none."""
        driver = self.host.driver
        try:
            found = await driver.match(snapshot, [key], "end", 1.0, timeout_s=TIMEOUT_S)
        except NotFound:
            return 0
        if found.lease is not None:
            await driver.release([found.lease], timeout_s=TIMEOUT_S)
        return max(found.qualities, default=0)


def _names(entries: set[Entry]) -> Sequence[str]:
    return sorted(f"{key.hex()[:8]} (epoch {epoch}, {quality})" for _, key, epoch, quality in entries)
