"""The core against a dict of lists, over seeded histories: visibility, pins, leases, conservation, bytes.

Bytes are simulated as the driver keeps them, by slot and generation, and are a keyed function of what the
block is: a hit that leads to other bytes is a wrong hit, whatever else holds.
"""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvstore.core.retention import Retention
from kvstore.errors import LeaseExpired
from kvstore.nouns import (
    DROP,
    ISOLATE,
    BlockRef,
    EpochPolicy,
    LeaseId,
    MissReason,
    Quality,
    Refusal,
    Revision,
    Tier,
    TxnId,
    allow_stale,
)
from tests.kvstore.core.conftest import INT8, LOSSLESS, MODEL, NAMESPACE, epoch
from tests.kvstore.core.conftest import key as key_of
from tests.kvstore.core.judged import Judged
from tests.kvstore.core.model import PAUSE_S, Block, Lease, Writing

KEYS = [0, 1, 2, 3, 100, 101]  # two chains

chains = st.sampled_from([[0, 1, 2, 3], [100, 101]])
subsets = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)
epochs = st.integers(1, 3)
qualities = st.sampled_from([LOSSLESS, INT8])
leases = st.floats(1.0, 9.0)
picks = st.integers(0, 10)
lags = st.integers(0, 2)
retentions = st.none() | st.builds(
    Retention, st.sampled_from([0, 35, 80, 100]), st.none() | st.floats(1.0, 9.0)
)
policies = st.sampled_from([ISOLATE, ISOLATE, allow_stale(1), allow_stale(2), DROP])


def payload(key: int, of: int, quality: Quality) -> bytes:
    return hashlib.sha256(b"%d %d %d" % (key, of, quality)).digest()


class CoreMachine(Judged):
    # -- rules -------------------------------------------------------------------------------------

    @rule(
        keys=chains | subsets,
        of=epochs,
        quality=qualities,
        pin_for_s=st.none() | leases,
        retention=retentions,
    )
    def put(
        self,
        keys: list[int],
        of: int,
        quality: Quality,
        pin_for_s: float | None,
        retention: Retention | None,
    ) -> None:
        """A writer that nothing stops: what fills the shard, so that the rest has something to meet."""
        txn_id = self.begin(keys, of, quality, 9.0, retention)
        for _ in keys:
            self._write(txn_id, 0)
        self._commit(txn_id, pin_for_s)

    @rule(keys=subsets, of=epochs, quality=qualities, lease_s=leases)
    def start_writing(self, keys: list[int], of: int, quality: Quality, lease_s: float) -> None:
        self.begin(keys, of, quality, lease_s)

    def begin(
        self,
        keys: list[int],
        of: int,
        quality: Quality,
        lease_s: float,
        retention: Retention | None = None,
    ) -> TxnId:
        model = self.model
        writing = Writing(of, quality, Lease(model.time + lease_s, lease_s, []), keys)
        for i, key in enumerate(keys):
            live = model.live(key, of, quality) if of >= model.oldest else None
            if live is not None:
                writing.exists[i] = live
                writing.lease.blocks.append(live)
        txn = self.shard.begin(keys, epoch(of), quality, lease_s=lease_s, retention=retention)
        self.room_was_made = True
        expected: list[Refusal | None] = []
        if of < model.oldest:
            model.writing[txn.id] = writing
            assert txn.refusals == [Refusal.EPOCH] * len(keys)
            self.txns[txn.id] = txn
            return txn.id
        taken = self.model.is_staged
        staged_before = [taken(key, of, quality) for key in keys]
        model.writing[txn.id] = writing
        for i in range(len(keys)):
            expected.append(self._outcome(writing, i, staged_before[i]))
        assert txn.refusals == expected
        self.txns[txn.id] = txn
        return txn.id

    def _outcome(self, writing: Writing, i: int, staged: bool) -> Refusal | None:
        if i in writing.exists:
            return Refusal.EXISTS
        if staged:
            return Refusal.STAGED
        if not self.model.has_room():
            return Refusal.NO_SPACE
        writing.staged.add(i)
        return None

    @precondition(lambda self: self.model.writing)
    @rule(pick=picks, which=picks)
    def write(self, pick: int, which: int) -> None:
        self._write(self._open_txn(pick)[0], which)

    def _write(self, txn_id: TxnId, which: int) -> None:
        writing = self.model.writing[txn_id]
        waiting = sorted(writing.staged - writing.written)
        if not waiting:
            return
        i = waiting[which % len(waiting)]
        version = self.shard.core.granted(self.txns[txn_id], i)
        assert version is not None
        place = Tier.HOST, version.ref.slot, version.ref.generation
        self.stored[place] = payload(writing.keys[i], writing.epoch, writing.quality)
        self.shard.core.written(self.txns[txn_id], i, None, self.shard.now)
        writing.written.add(i)
        writing.lease.expires = max(writing.lease.expires, self.model.time + writing.lease.duration_s)

    @precondition(lambda self: self.model.writing)
    @rule(pick=picks, which=picks)
    def refuse(self, pick: int, which: int) -> None:
        """A frame arrived that was not what it claimed to be."""
        txn_id, writing = self._open_txn(pick)
        waiting = sorted(writing.staged - writing.written)
        if waiting:
            i = waiting[which % len(waiting)]
            self.shard.core.written(self.txns[txn_id], i, Refusal.CHECKSUM, self.shard.now)
            writing.staged.remove(i)
            writing.lease.expires = max(writing.lease.expires, self.model.time + writing.lease.duration_s)

    @precondition(lambda self: self.model.writing)
    @rule(pick=picks, pin_for_s=st.none() | leases)
    def commit(self, pick: int, pin_for_s: float | None) -> None:
        self._commit(self._open_txn(pick)[0], pin_for_s)

    def _commit(self, txn_id: TxnId, pin_for_s: float | None) -> None:
        writing = self.model.writing[txn_id]
        refusals = list(self.txns[txn_id].refusals)
        answer = self.shard.core.commit(txn_id, pin_for_s, self.shard.now)
        assert self.shard.core.commit(txn_id, pin_for_s, self.shard.now) is answer
        del self.model.writing[txn_id]
        kept: list[Block] = []
        for i, (said, was) in enumerate(zip(self.shard.core.blocks(answer), refusals, strict=True)):
            landed = self._land(writing, i, said, answer.revision)
            if landed is None:
                assert said is self._why_not(writing, i, was)
            else:
                assert said == landed.ref
                kept.append(landed)
        assert (answer.lease is not None) == bool(pin_for_s and kept)
        if answer.lease is not None and pin_for_s:
            self.model.leases[answer.lease] = Lease(self.model.time + pin_for_s, pin_for_s, kept)

    def _why_not(self, writing: Writing, i: int, was: Refusal | None) -> Refusal | None:
        if i in writing.exists:
            block = writing.exists[i]
            return Refusal.PURGED if block.purged or block.dead else Refusal.CHECKSUM
        if was is not None:
            return was
        if i in writing.forbidden:
            return Refusal.PURGED
        return Refusal.EPOCH if writing.epoch < self.model.oldest else Refusal.UNWRITTEN

    def _land(self, writing: Writing, i: int, said: BlockRef | Refusal, revision: int) -> Block | None:
        if i in writing.exists:
            block = writing.exists[i]
            return None if block.corrupt or block.purged or block.dead else block
        refused = i in writing.forbidden or writing.epoch < self.model.oldest
        if refused or i not in writing.written:
            return None
        key = writing.keys[i]
        winner = self.model.live(key, writing.epoch, writing.quality)
        if winner is not None:
            return winner
        assert isinstance(said, BlockRef)
        lesser = self.model.live(key, writing.epoch, INT8)
        if lesser is not None:
            lesser.retired = revision
        block = Block(key, writing.epoch, writing.quality, said, revision)
        self.model.blocks.append(block)
        return block

    @precondition(lambda self: self.model.writing)
    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        txn_id, _ = self._open_txn(pick)
        del self.model.writing[txn_id]
        self.shard.core.abort(txn_id)
        self.shard.core.abort(txn_id)

    @rule(keys=chains, of=epochs, least=qualities, lag=lags, lease_s=leases)
    def match(self, keys: list[int], of: int, least: Quality, lag: int, lease_s: float) -> None:
        run: list[Block] = []
        for key in keys:
            seen = self.model.seen(key, of, least, lag)
            if seen is None:
                break
            run.append(seen)
        matched = self.shard.match(keys, epoch(of), min_quality=least, lag=lag, lease_s=lease_s)
        assert [v.ref for v in matched.versions] == [block.ref for block in run]
        assert (matched.miss is None) == (len(run) == len(keys))
        for block, version in zip(run, matched.versions, strict=True):
            place = version.tier, block.ref.slot, block.ref.generation
            assert self.stored[place] == payload(block.key, block.epoch, block.quality)
        assert (matched.lease is None) == (not run)
        if matched.lease is not None:
            self.model.leases[matched.lease] = Lease(self.model.time + lease_s, lease_s, run)

    @rule(key=st.sampled_from(KEYS), of=epochs, least=qualities, back=st.integers(0, 6))
    def look_back(self, key: int, of: int, least: Quality, back: int) -> None:
        """A fixed revision is answered with what stood there, or with a miss for good."""
        at = max(0, self.shard.core.revision - back)
        then = Revision(self.watched_to.incarnation, at)
        matched = self.shard.match([key], epoch(of), min_quality=least, at=then)
        if matched.versions:
            stood = self.model.stood(key, of, least, at)
            assert matched.versions[0].ref in [block.ref for block in stood if block is not None]
            assert (key, at, of, least) not in self.missed
        else:
            self.missed.add((key, at, of, least))
        self.shard.release(matched.lease)

    @precondition(lambda self: self.model.leases)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        lease = list(self.model.leases)[pick % len(self.model.leases)]
        del self.model.leases[lease]
        self.shard.core.release([lease, lease])  # type: ignore[list-item]

    @precondition(lambda self: self.model.leases)
    @rule(pick=picks, lease_s=leases)
    def renew(self, pick: int, lease_s: float) -> None:
        name, lease = list(self.model.leases.items())[pick % len(self.model.leases)]
        assert self.shard.core.renew(name, lease_s, self.shard.now)  # type: ignore[arg-type]
        lease.expires = max(lease.expires, self.model.time + lease_s)

    @rule(of=epochs, policy=policies, swept=st.booleans())
    def advance(self, of: int, policy: EpochPolicy, swept: bool) -> None:
        self._advance(of, policy, swept)

    def _advance(self, of: int, policy: EpochPolicy, swept: bool) -> None:
        model = self.model
        self.shard.core.advance_epoch(MODEL, of, policy)
        if of >= model.current:
            model.current, model.lag_max = of, policy.stale_lag_max
            model.oldest = of if policy.drop_older else model.oldest
            model.kill(b for b in model.blocks if b.epoch < model.oldest)
            self._sweep(swept)

    def _sweep(self, swept: bool) -> None:
        """The driver sweeps when it has time; until then dead bytes lie about."""
        self.room_was_made, self.unswept = True, True
        if swept:
            while self.shard.core.sweep(3):
                pass
            self.unswept = False

    @rule()
    def sweep(self) -> None:
        self._sweep(True)

    @rule(of=st.none() | epochs, swept=st.booleans())
    def purge(self, of: int | None, swept: bool) -> None:
        self.shard.core.purge(NAMESPACE, None, of)
        self.model.kill(b for b in self.model.blocks if of in (None, b.epoch))
        self._forbid(set(KEYS), of)
        self._sweep(swept)

    @rule(keys=subsets, of=st.none() | epochs)
    def purge_keys(self, keys: list[int], of: int | None) -> None:
        self.shard.core.purge(NAMESPACE, tuple(map(key_of, keys)), of)
        for block in self.model.blocks:
            if block.key in keys and of in (None, block.epoch) and not block.gone:
                block.retired, block.purged = block.retired or self.shard.core.revision, True
        self._forbid(set(keys), of)

    def _forbid(self, keys: set[int], of: int | None) -> None:
        for writing in self.model.writing.values():
            if of in (None, writing.epoch):
                writing.forbidden |= {i for i in writing.staged if writing.keys[i] in keys}

    @rule(back=st.integers(0, 6))
    def compact(self, back: int) -> None:
        at = Revision(self.watched_to.incarnation, max(0, self.shard.core.revision - back))
        horizon = self.shard.core.past.compact(at)
        assert horizon >= at
        if horizon.counter:
            before = horizon._replace(counter=horizon.counter - 1)
            assert self.shard.match([KEYS[0]], at=before).miss is MissReason.COMPACTED

    @rule()
    def restart(self) -> None:
        """Everything is forgotten; what was taken of the earlier life names nothing."""
        refs = [block.ref for block in self.model.blocks]
        leases = [LeaseId(lease) for lease in self.model.leases]
        txns = list(self.txns)
        self.start()
        self.nothing_names_what_was(refs, leases, txns)

    def nothing_names_what_was(self, refs: list[BlockRef], leases: list[LeaseId], txns: list[TxnId]) -> None:
        core = self.shard.core
        assert all(core.resolve(NAMESPACE, ref) is MissReason.STALE_REFERENCE for ref in refs)
        assert not any(core.renew(lease, 9.0, self.shard.now) for lease in leases)
        for txn in txns:
            with pytest.raises(LeaseExpired):
                core.commit(txn, None, self.shard.now)
        core.release(leases)

    @precondition(lambda self: any(b.is_live for b in self.model.blocks))
    @rule(pick=picks)
    def report(self, pick: int) -> None:
        live = [b for b in self.model.blocks if b.is_live]
        block = live[pick % len(live)]
        version = self.shard.core.resolve(NAMESPACE, block.ref)
        assert not isinstance(version, MissReason)
        self.shard.core.report(version)
        block.retired, block.corrupt = self.shard.core.revision, True

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.shard.later(1)
            self.model.now = self.shard.now
            self.model.reap()

    @rule(seconds=st.floats(PAUSE_S * 1.5, 500.0))
    def pause(self, seconds: float) -> None:
        """The process stood still: no lease may end of it."""
        self.shard.now += seconds
        self.model.now = self.shard.now
        self.model.paused_s += seconds
        assert self.shard.core.reap(self.shard.now) == 0

    def _open_txn(self, pick: int) -> tuple[TxnId, Writing]:
        name = list(self.model.writing)[pick % len(self.model.writing)]
        return TxnId(name), self.model.writing[name]


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(
    max_examples=200, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
