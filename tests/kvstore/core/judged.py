"""What must hold after every step of the core's machine, and the state it is judged by."""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, invariant

from kvstore.core.rooms import Freed
from kvstore.core.transactions import Txn
from kvstore.core.versions import ON_HOST, TO_HOST
from kvstore.nouns import BlockKey, ChangeKind, Incarnation, Quality, Revision, Tier, TxnId
from tests.kvstore.core.conftest import MODEL, NAMESPACE, NBYTES, Shard
from tests.kvstore.core.conftest import key as key_of
from tests.kvstore.core.model import PAUSE_S, Block, Model

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
        self.shard = self.make_shard(incarnation)
        self.model = Model(CAPACITY_BLOCKS, self.lies_on_host)
        self.unswept = False
        self.watched: dict[Entry, int] = {}  # what a watcher believes to be there, and on which tier
        self.watched_to = Revision(incarnation, 0)
        self.txns: dict[TxnId, Txn] = {}
        self.stored: dict[tuple[Tier, int, int], bytes] = {}
        """(tier, slot, generation) -> bytes, as the driver keeps them."""
        self.missed: set[tuple[int, int, int, Quality]] = set()  # what a fixed revision did not see once
        self.room_was_made = False
        self.looked_at = 0  # revision of the last look at who is still there

    def make_shard(self, incarnation: Incarnation) -> Shard:
        return Shard(CAPACITY_BLOCKS, incarnation=incarnation, pause_s=PAUSE_S, slots_max=2 * CAPACITY_BLOCKS)

    def lies_on_host(self, block: Block) -> bool:
        """Or is on its way there."""
        table = self.shard.core.index.versions
        is_here = table.is_current(block.ref.slot, block.ref.generation)
        return is_here and bool(table.residences[block.ref.slot] & (ON_HOST | TO_HOST))

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
                if block.retired is None:
                    block.evicted = self.looked_at, self.shard.core.revision
            else:
                hidden = block.retired is not None or block.dead
                lies_about = block.dead and self.unswept
                assert not hidden or pins[block] or lies_about, "hidden, held by nobody, and still here"
                assert version.pins == pins[block]
        self.room_was_made = False
        self.looked_at = self.shard.core.revision

    @invariant()
    def what_was_freed_is_discarded(self) -> None:
        for freed in self.shard.core.index.freed:
            self.discard(freed)
        self.shard.core.index.freed.clear()

    def discard(self, freed: Freed) -> None:
        self.stored.pop((freed.tier, freed.ref.slot, freed.ref.generation), None)

    @invariant()
    def the_watcher_knows_what_is_there(self) -> None:
        """From changes alone, in order, none twice; the same as the listing, the same as the model."""
        core = self.shard.core
        upto, changes = core.past.changed_since(self._resumed(), (NAMESPACE,), 1000)
        for change in changes:
            assert self.watched_to < (upto.incarnation, change.revision) <= upto
            if change.kind is ChangeKind.PURGED:
                self.watched = {e: t for e, t in self.watched.items() if change.epoch not in (0, e[1])}
            elif change.kind is ChangeKind.EPOCH:
                oldest = core.epochs.show(MODEL).oldest
                self.watched = {e: t for e, t in self.watched.items() if e[1] >= oldest}
            elif change.kind in (ChangeKind.COMMITTED, ChangeKind.MOVED):
                entry = change.key, change.epoch, change.quality
                assert (entry in self.watched) == (change.kind is ChangeKind.MOVED), "told twice, or never"
                self.watched[entry] = change.tier
            else:
                self.watched.pop((change.key, change.epoch, change.quality), None)
        self.watched_to = upto
        _, listed, _ = core.past.listing(NAMESPACE, None, 0, 1000)
        assert self.watched == {(v.key, v.epoch.number, int(v.quality)): int(v.tier) for v in listed}
        live = {(key_of(b.key), b.epoch, int(b.quality)) for b in self.model.blocks if b.is_live}
        assert self.watched.keys() == live

    def _resumed(self) -> Revision:
        """Where the watcher goes on: where it was, unless that was compacted meanwhile."""
        core = self.shard.core
        if self.watched_to.counter >= core.changes.horizon:
            return self.watched_to
        at, listed, _ = core.past.listing(NAMESPACE, None, 0, 1000)
        self.watched = {(v.key, v.epoch.number, int(v.quality)): int(v.tier) for v in listed}
        self.watched_to = at
        return at

    @invariant()
    def nothing_leaks(self) -> None:
        self.shard.core.check_integrity()
        usage = self.shard.core.usage()
        staged = sum(len(w.staged) for w in self.model.writing.values())
        here = [b for b in self.model.blocks if not b.gone and self.lies_on_host(b)]
        assert usage.staged_nbytes == staged * NBYTES
        assert usage.live_nbytes == sum(b.nbytes for b in here if b.retired is None)
        assert usage.retired_nbytes == sum(b.nbytes for b in here if b.retired is not None)
        moving = sum(bool(moving.lease.blocks) for moving in self.model.moving.values())
        assert self.shard.core.leases == len(self.model.leases) + len(self.model.writing) + moving
