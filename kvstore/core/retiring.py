"""Taking versions out of sight, or only out of one tier: each at a revision that watchers hear of."""

from __future__ import annotations

from collections import Counter

from kvstore.core.changes import ChangeLog
from kvstore.core.epochs import EpochTable
from kvstore.core.index import Index
from kvstore.core.rooms import Room
from kvstore.nouns import ChangeKind


class Retiring:
    def __init__(self, index: Index, epochs: EpochTable, changes: ChangeLog, counters: Counter[str]) -> None:
        self._index = index
        self._epochs = epochs
        self._changes = changes
        self._counters = counters

    def advance(self) -> int:
        return self._changes.advance()

    def retire(self, slot: int, revision: int) -> None:
        """Out of sight from the revision on, which is the shard's newest."""
        if not self._index.is_purged(slot):  # else it was told of, and its name may stand for another by now
            self.tell(ChangeKind.RETIRED, slot)
        self._index.retire(slot, revision)

    def evict(self, slot: int) -> None:
        """Give up an idle version altogether, at a revision of its own."""
        self.retire(slot, self._changes.advance())
        self._counters["evicted"] += 1

    def evict_from(self, room: Room, slot: int) -> None:
        """Give up what a tier holds of an idle version: all of it, unless it lies on another one too."""
        others = any(
            self._index.versions.residences[slot] & r.held for r in self._index.rooms if r is not room
        )
        if others:
            self.leave(room, slot)
            self._counters[f"evicted:{room.tier.name.lower()}"] += 1
        else:
            self.evict(slot)

    def leave(self, room: Room, slot: int) -> None:
        self._index.leave(slot, room)
        self.tell_moved(slot)

    def tell_moved(self, slot: int) -> None:
        """At a revision of its own: the version lies elsewhere from now on."""
        self._changes.advance()
        if not self._index.is_dead(slot):
            self.tell(ChangeKind.MOVED, slot)

    def tell(self, kind: ChangeKind, slot: int) -> None:
        """At the shard's newest revision."""
        table = self._index.versions
        number = self._epochs.bound[table.epochs[slot]].epoch.number
        key, quality, tier = table.key(slot), table.qualities[slot], table.tiers[slot]
        self._changes.add(kind, self._index.space_of(slot).id, key, number, quality, tier)
