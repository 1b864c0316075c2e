"""Deletion for good, and the sweep that frees what no reader will ever see again.

A purge takes one revision and writes a number (or looks at the keys it names): from then on nothing of its
scope is seen, at any revision. Bytes follow in `sweep`, a bounded number of slots at a time, so that
deleting a million versions stands in nobody's way. Pinned bytes stay until their pins go. What was being
written when its key was purged is refused at its commit: it was made before.
"""

from __future__ import annotations

from collections import Counter

from kvstore.core.changes import ChangeLog
from kvstore.core.epochs import EpochTable
from kvstore.core.index import Index
from kvstore.core.spaces import Space
from kvstore.core.versions import FORBIDDEN, NONE, State
from kvstore.nouns import BlockKey, ChangeKind

_LIVE = int(State.LIVE)


class Purging:
    def __init__(self, index: Index, epochs: EpochTable, changes: ChangeLog, counters: Counter[str]) -> None:
        self._index = index
        self._epochs = epochs
        self._changes = changes
        self._counters = counters
        self._unswept = 0  # slots the sweep has still to look at
        self._circle = 0  # of so many: those there were when something died last
        self._next = 0

    def purge_space(self, space: Space, epoch_id: int | None) -> None:
        """All of a namespace, or of one of its epochs. O(what is being written there)."""
        revision = self._changes.advance()
        for staged in space.staged.values():
            for slot in staged:
                if epoch_id is None or self._index.versions.epochs[slot] == epoch_id:
                    self._index.versions.written[slot] |= FORBIDDEN
        if epoch_id is None:
            space.purged = revision
        else:
            space.purged_epochs[epoch_id] = revision
        space.purged_last = revision
        number = 0 if epoch_id is None else self._epochs.bound[epoch_id].epoch.number
        self._changes.add(ChangeKind.PURGED, space.id, epoch=number)
        self.sweep_again()

    def purge_keys(self, space: Space, keys: tuple[BlockKey, ...], epoch_id: int | None) -> tuple[int, int]:
        """Every version of the keys; how many went at once, and their bytes."""
        revision, table, index = self._changes.advance(), self._index.versions, self._index
        before = len(index), index.held_nbytes
        for key in dict.fromkeys(keys):
            for slot in space.staged.get(key, ()):
                if epoch_id is None or table.epochs[slot] == epoch_id:
                    table.written[slot] |= FORBIDDEN
            for slot in list(index.chain(space, space.heads.get(key, NONE))):
                if epoch_id is None or table.epochs[slot] == epoch_id:
                    self._purge(space, key, slot, revision)
        return before[0] - len(index), before[1] - index.held_nbytes

    def sweep_again(self) -> None:
        """Something died without being named: every slot is to be looked at."""
        self._unswept = self._circle = self._index.versions.n_slots

    def sweep(self, slots_max: int) -> int:
        """Look at some slots; free what is dead and not pinned. How many are still to be looked at."""
        index, table = self._index, self._index.versions
        for _ in range(min(slots_max, self._unswept)):
            self._unswept -= 1
            slot = self._next % self._circle
            self._next = slot + 1
            if table.states[slot] == _LIVE and not table.pins[slot] and index.is_dead(slot):
                self._counters["swept"] += 1
                self._counters["swept_nbytes"] += table.nbytes[slot]
                index.retire(slot, self._changes.revision)
        return self._unswept

    def _purge(self, space: Space, key: BlockKey, slot: int, revision: int) -> None:
        table = self._index.versions
        table.written[slot] |= FORBIDDEN
        if table.states[slot] == _LIVE:
            if not self._index.is_purged(slot):
                number = self._epochs.bound[table.epochs[slot]].epoch.number
                self._changes.add(ChangeKind.RETIRED, space.id, key, number, table.qualities[slot])
            self._index.retire(slot, revision, into=State.GONE)
        else:
            table.states[slot] = State.GONE  # it was retired and is pinned: older snapshots lose it too
            space.horizons[key] = revision
