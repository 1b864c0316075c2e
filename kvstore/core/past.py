"""What a shard still knows of its past: which revisions are answered, to whom.

Below the horizon, and in another incarnation, nothing is known. Failure is an answer (a MissReason), or
Compacted.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from kvstore.core.chain import run_of, view_of
from kvstore.core.changes import ChangeLog
from kvstore.core.epochs import EpochTable
from kvstore.core.index import Index
from kvstore.core.listing import list_page
from kvstore.core.spaces import Space
from kvstore.core.state import CoreConfig
from kvstore.errors import Compacted, ConfigError
from kvstore.nouns import BlockKey, Change, Listed, MissReason, NamespaceId, Revision, Snapshot


class Past:
    def __init__(self, config: CoreConfig, index: Index, epochs: EpochTable, changes: ChangeLog) -> None:
        self._config = config
        self._index = index
        self._epochs = epochs
        self._changes = changes
        self._horizon = 0  # no snapshot of an older revision is answered

    def at(self, counter: int) -> Revision:
        return Revision(self._config.incarnation, counter)

    def cannot_read_at(self, at: Revision | None) -> MissReason | None:
        if at is None:
            return None
        if at.incarnation != self._config.incarnation or at.counter < self._horizon:
            return MissReason.COMPACTED
        return MissReason.NOT_YET if at.counter > self._changes.revision else None  # it would gain: never

    def run_of(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], space: Space
    ) -> tuple[list[int], MissReason | None]:
        """Slots of the longest prefix run of the keys that the snapshot sees, and why it ended."""
        miss = self.cannot_read_at(snapshot.revision)
        if miss is not None:
            return [], miss
        view = view_of(snapshot, space.namespace.model_id, self._epochs)
        if isinstance(view, MissReason):
            return [], view if keys else None
        return run_of(keys, view, space, self._index.versions, self._epochs)

    def listing(
        self, namespace: NamespaceId, at: Revision | None, cursor: int, limit: int
    ) -> tuple[Revision, list[Listed], int]:
        """Versions that stand at a revision (None: now), the slots from `cursor` on; where to go on, or 0.

        What is evicted between two pages is missing from the second, and in the watch. Raises Compacted.
        """
        space = self._index.space(namespace)
        counter = self._changes.revision if at is None else at.counter
        if self.cannot_read_at(at) is not None or counter < space.purged_last:
            raise Compacted(f"what stood at {at} is not known any more: list at the latest revision")
        versions_max = max(1, min(limit, self._config.limits.page_max))
        found, stopped = list_page(self._index, self._epochs, space, counter, cursor, versions_max)
        return self.at(counter), found, stopped

    def changed_since(
        self, after: Revision | None, namespaces: Container[NamespaceId], changes_max: int
    ) -> tuple[Revision, list[Change]]:
        """Changes after a revision (None: none yet, watch from now on), complete up to the one answered.

        Raises Compacted for a revision of another incarnation or below the horizon.
        """
        if after is None:
            return self.at(self._changes.revision), []
        if after.incarnation != self._config.incarnation or not (
            self._changes.horizon <= after.counter <= self._changes.revision
        ):
            raise Compacted(f"changes after {after} are not known: list, and watch from that revision")
        found, upto = self._changes.since(after.counter, namespaces, changes_max)
        return self.at(upto), found

    def compact(self, revision: Revision) -> Revision:
        """Forget what only snapshots and watches below a revision need. The horizon from here on.

        Raises Compacted for a revision of another incarnation, ConfigError for one that is still to come.
        """
        if revision.incarnation != self._config.incarnation:
            raise Compacted(f"{revision} is of another life of {self._config.shard}: all of it is forgotten")
        if revision.counter > self._changes.revision:
            raise ConfigError(
                f"revision {revision.counter} is still to come: {self._changes.revision} is the latest"
            )
        self._horizon = max(self._horizon, revision.counter)
        self._changes.forget(self._horizon)
        for space in self._index.by_index:
            old = [key for key, horizon in space.horizons.items() if horizon <= self._horizon]
            for key in old:
                del space.horizons[key]
        return self.at(self._horizon)
