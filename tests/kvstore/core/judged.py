"""What must hold after every step of the core's machine, and the state it is judged by."""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, invariant

from kvstore.core.transactions import Txn
from kvstore.nouns import BlockKey, ChangeKind, Incarnation, Quality, Revision, TxnId
from tests.kvstore.core.conftest import MODEL, NAMESPACE, NBYTES, Shard
from tests.kvstore.core.conftest import key as key_of
from tests.kvstore.core.model import PAUSE_S, Model

CAPACITY_BLOCKS = 6
Entry = tuple[BlockKey, int, int]


class Judged(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lives = 0
        self.start()

    def start(self) -> None:
        self.lives += 1
        incarnation = Incarnation(self.lives)
        self.shard = Shard(
            CAPACITY_BLOCKS, incarnation=incarnation, pause_s=PAUSE_S, slots_max=2 * CAPACITY_BLOCKS
        )
        self.model = Model(CAPACITY_BLOCKS)
        self.unswept = False
        self.watched: set[Entry] = set()  # what a watcher believes to be there
        self.watched_to = Revision(incarnation, 0)
        self.txns: dict[TxnId, Txn] = {}
        self.stored: dict[
            tuple[int, int], bytes
        ] = {}  # (slot, generation) -> bytes, as the driver keeps them
        self.missed: set[tuple[int, int, int, Quality]] = set()  # what a fixed revision did not see once
        self.room_was_made = False

    # -- what holds after every step ---------------------------------------------------------------

    @invariant()
    def bytes_go_only_where_nobody_held_them(self) -> None:
        pins = self.model.pins()
        for block in self.model.blocks:
            if block.gone:
                continue
            version = self.shard.core.index.at(block.ref.slot, block.ref.generation)
            if version is None:
                assert not pins[block], "a pinned block went"
                freed = block.retired is not None or block.dead
                assert freed or self.room_was_made, "evicted although nobody asked for room"
                block.gone = True
            else:
                hidden = block.retired is not None or block.dead
                lies_about = block.dead and self.unswept
                assert not hidden or pins[block] or lies_about, "hidden, held by nobody, and still here"
                assert version.pins == pins[block]
        self.room_was_made = False

    @invariant()
    def what_was_freed_is_discarded(self) -> None:
        for ref, _, _ in self.shard.core.index.freed:
            self.stored.pop((ref.slot, ref.generation), None)
        self.shard.core.index.freed.clear()

    @invariant()
    def the_watcher_knows_what_is_there(self) -> None:
        """From changes alone, in order, none twice; the same as the listing, the same as the model."""
        core = self.shard.core
        upto, changes = core.past.changed_since(self._resumed(), (NAMESPACE,), 1000)
        for change in changes:
            assert self.watched_to < (upto.incarnation, change.revision) <= upto
            if change.kind is ChangeKind.PURGED:
                self.watched = {e for e in self.watched if change.epoch not in (0, e[1])}
            elif change.kind is ChangeKind.EPOCH:
                oldest = core.epochs.show(MODEL).oldest
                self.watched = {e for e in self.watched if e[1] >= oldest}
            elif change.kind is ChangeKind.COMMITTED:
                assert (change.key, change.epoch, change.quality) not in self.watched, "told twice"
                self.watched.add((change.key, change.epoch, change.quality))
            else:
                self.watched.discard((change.key, change.epoch, change.quality))
        self.watched_to = upto
        _, listed, _ = core.past.listing(NAMESPACE, None, 0, 1000)
        assert self.watched == {(v.key, v.epoch.number, int(v.quality)) for v in listed}
        live = {(key_of(b.key), b.epoch, int(b.quality)) for b in self.model.blocks if b.is_live}
        assert self.watched == live

    def _resumed(self) -> Revision:
        """Where the watcher goes on: where it was, unless that was compacted meanwhile."""
        core = self.shard.core
        if self.watched_to.counter >= core.changes.horizon:
            return self.watched_to
        at, listed, _ = core.past.listing(NAMESPACE, None, 0, 1000)
        self.watched = {(v.key, v.epoch.number, int(v.quality)) for v in listed}
        self.watched_to = at
        return at

    @invariant()
    def nothing_leaks(self) -> None:
        self.shard.core.check_integrity()
        usage = self.shard.core.usage()
        staged = sum(len(w.staged) for w in self.model.writing.values())
        here = [b for b in self.model.blocks if not b.gone]
        assert usage.staged_nbytes == staged * NBYTES
        assert usage.live_nbytes == sum(b.retired is None for b in here) * NBYTES
        assert usage.retired_nbytes == sum(b.retired is not None for b in here) * NBYTES
        assert self.shard.core.leases == len(self.model.leases) + len(self.model.writing)
