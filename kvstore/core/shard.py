"""One shard's state machine: synchronous, deterministic, without I/O.

Every method takes the time and answers at once; bytes are the driver's business. The driver writes and
reads the slots the core names, tells it what arrived (`written`) and what turned out corrupt (`report`),
and discards what `index.freed` names. All bounds are in `CoreLimits`.

What is held is always held by a lease: matches, transactions and commits that pin. `reap` frees what
expired, without any traffic. Lease and transaction ids cannot be guessed: to know one is to own it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

from kvstore.core import integrity
from kvstore.core.changes import ChangeLog
from kvstore.core.continuations import Continuations
from kvstore.core.epochs import UNBOUND, EpochTable
from kvstore.core.foreseen import Foreseen, Why
from kvstore.core.holds import Holds
from kvstore.core.ids import Ids
from kvstore.core.index import Index
from kvstore.core.leases import LeaseTable
from kvstore.core.moves import Moves
from kvstore.core.offers import Offers
from kvstore.core.past import Past
from kvstore.core.purging import Purging
from kvstore.core.resizing import RoomBelow
from kvstore.core.restoring import restore
from kvstore.core.retiring import Retiring
from kvstore.core.seams import MakeAdmission, MakePolicy, MakePredictor
from kvstore.core.state import Announcement, Committed, CoreConfig, Matched, Namespace, Offer, Usage
from kvstore.core.transactions import Txn, TxnTable
from kvstore.core.versions import NONE, State, Version, gather
from kvstore.errors import ConfigError, EpochUnknown, LeaseExpired, OverLimit
from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    BlockMeta,
    BlockRef,
    ChangeKind,
    Epoch,
    EpochPolicy,
    LeaseId,
    MissReason,
    NamespaceId,
    Quality,
    Refusal,
    Revision,
    Snapshot,
    Tier,
    TxnId,
)

_MISS_LABEL = {reason: f"miss:{reason.value}" for reason in MissReason}


class ShardCore:
    def __init__(
        self,
        config: CoreConfig,
        make_policy: MakePolicy,
        make_predictor: MakePredictor | None = None,
        make_admission: MakeAdmission | None = None,
    ) -> None:
        """Without a predictor and an admission policy everything is worth a place on the tier below."""
        limits = config.limits
        ids = Ids(config.incarnation, config.id_secret)
        self.config = config
        self.epochs = EpochTable(limits.models_max, limits.epochs_max)
        self._leases = LeaseTable(ids, limits.leases_max, limits.lease_s_max, limits.pause_s)
        self.index = Index(config, make_policy, self.epochs, self._leases)
        self.counters: Counter[str] = Counter()
        self.changes = ChangeLog(limits.changes_max)
        self._holds = Holds(self._leases, self.index)
        self._txns = TxnTable(ids, limits.txns_max, limits.answers_max)
        self.retiring = Retiring(self.index, self.epochs, self.changes, self.counters)
        self._offers = Offers(self.index, self.epochs, self._holds, self.retiring, self.counters)
        self._purging = Purging(self.index, self.epochs, self.changes, self.counters)
        admission = None
        if make_predictor is not None:
            self.predictor = make_predictor(self.index.uses)
            self.index.uses.observers.append(self.predictor.observe)
            admission = make_admission(self.index.uses, self.predictor) if make_admission else None
        self.moves = Moves(self.index, self._holds, self.retiring, config.tiering, admission, self.counters)
        self.room_below = RoomBelow(self.index, self.retiring)
        self.foreseen = Foreseen(self.index, self.moves, config.foresight, self.counters)
        self.continuations: Continuations | None = None
        if make_predictor is not None:
            self.continuations = Continuations(
                self.index, self.moves, self.foreseen, self.predictor, config.foresight
            )
        self.past = Past(config, self.index, self.epochs, self.changes)

    @property
    def revision(self) -> int:
        return self.changes.revision

    # -- namespaces and epochs ---------------------------------------------------------------------

    def open_namespace(self, namespace_id: NamespaceId, namespace: Namespace) -> None:
        """Make the namespace known. Idempotent. Raises ConfigError when it is known as another one."""
        known = self.index.spaces.get(namespace_id)
        if known is None and len(self.index.spaces) >= self.config.limits.namespaces_max:
            raise OverLimit(f"{len(self.index.spaces)} namespaces are open: raise namespaces_max")
        if known is not None and known.namespace != namespace:
            raise ConfigError(f"namespace {namespace_id.hex()} is open with another model, layout or tenant")
        self.index.open(namespace_id, namespace)

    def namespace(self, namespace_id: NamespaceId) -> Namespace:
        """Raises NotFound: the shard restarted since, open it again."""
        return self.index.space(namespace_id).namespace

    def register_epoch(self, model_id: str, epoch: Epoch) -> None:
        """Bind a number to weights, for ever. The first epoch of a model is its current one."""
        self.epochs.register(model_id, epoch)

    def advance_epoch(self, model_id: str, number: int, policy: EpochPolicy = ISOLATE) -> Revision:
        """Make a registered epoch the current one. O(namespaces of the model), whatever they hold.

        Nothing is flushed: older versions go first when room is needed, dropped ones in `sweep`.
        """
        if self.epochs.advance(model_id, number, policy, self.revision + 1):
            self.changes.advance()
            for space in self.index.by_index:
                if space.namespace.model_id == model_id:
                    self.changes.add(ChangeKind.EPOCH, space.id, epoch=number)
            if policy.drop_older:
                self._purging.sweep_again()
        return self.past.at(self.revision)

    # -- reading -----------------------------------------------------------------------------------

    def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, now: float
    ) -> Matched:
        """The longest prefix run of `keys` the snapshot sees, pinned in the same step."""
        if len(keys) > self.config.limits.keys_max:
            raise OverLimit(f"{len(keys)} keys in one match: at most {self.config.limits.keys_max}")
        space = self.index.space(snapshot.namespace)
        self._leases.observe(now)
        run, miss = self.past.run_of(snapshot, keys, space)
        if self.foreseen:
            self.foreseen.asked_for(run)
        if self.index.kept:
            self.index.kept.asked_for(run)
        lease = self._holds.grant(owner, lease_s, space, run, now) if run else None
        self.counters["match_keys"] += len(keys)
        self.counters["match_hits"] += len(run)
        if miss is not None:
            self.counters[_MISS_LABEL[miss]] += 1
        table = self.index.versions
        tiers = gather(table.tiers, run)
        if Tier.NVME in tiers:
            self.moves.want_on_host(slot for slot, tier in zip(run, tiers, strict=True) if tier == Tier.NVME)
        return Matched(
            run,
            gather(table.generations, run),
            gather(table.epochs, run),
            gather(table.qualities, run),
            tiers,
            gather(table.nbytes, run),
            lease,
            miss,
        )

    def announce(self, snapshot: Snapshot, keys: Sequence[BlockKey]) -> Announcement:
        """As `match`, but nothing is pinned nor counted as used: what of the run lies below is to come up,
        as far as the host could hold the run at all, its first blocks first. O(keys)."""
        if len(keys) > self.config.limits.keys_max:
            raise OverLimit(f"{len(keys)} keys in one announcement: at most {self.config.limits.keys_max}")
        run, _ = self.past.run_of(snapshot, keys, self.index.space(snapshot.namespace))
        self.counters["announced_keys"] += len(keys)
        self.foreseen.bring(run, Why.ANNOUNCED)
        return self.foreseen.standing(
            list(zip(run, gather(self.index.versions.generations, run), strict=True))
        )

    def look_ahead(self, now: float) -> None:
        """Find out what came of what was foreseen, and foresee more. To be called regularly: O(1) of what
        there is."""
        self._leases.observe(now)
        self.foreseen.settle()
        if self.continuations is not None:
            self.continuations.bring_likely()

    def resolve(self, namespace: NamespaceId, ref: BlockRef) -> Version | MissReason:
        """The version behind a reference, if its bytes are still the ones it was taken of, and in the
        namespace it was taken in."""
        if not self.index.serves(namespace, ref):
            return self.missed(MissReason.STALE_REFERENCE)
        return self.index.row(ref.slot)

    def missed(self, reason: MissReason) -> MissReason:
        """Counted: the driver found out what the core could not know."""
        self.counters[_MISS_LABEL[reason]] += 1
        return reason

    def renew(self, lease: LeaseId, lease_s: float, now: float) -> bool:
        self._leases.observe(now)
        return self._leases.renew(lease, lease_s, now)

    def release(self, leases: Sequence[LeaseId]) -> None:
        """Drop leases with their pins, or abort the transactions they hold. Idempotent.

        However many leases a chain was held by, it is let go of at once: its tail is to go first.
        """
        let_go: list[int] = []
        for lease in leases:
            txn = self._txns.of_lease(lease)
            if txn is not None:
                self._offers.drop_staged(txn)
                self._txns.end(txn, None)
            let_go += self._holds.end(lease)
        self.index.unpin(let_go)

    # -- writing -----------------------------------------------------------------------------------

    def begin(
        self,
        namespace_id: NamespaceId,
        epoch: Epoch,
        quality: Quality,
        offers: Sequence[Offer],
        owner: str,
        lease_s: float,
        request_id: bytes,
        now: float,
    ) -> Txn:
        """Reserve a slot for each offer that may be written. The same request id answers the same txn."""
        self._leases.observe(now)
        retried = self._txns.of_request(request_id)
        if retried is not None:
            same = (retried.namespace, retried.epoch, retried.quality) == (namespace_id, epoch, quality)
            if not same or (retried.answer is None and retried.offers != tuple(offers)):
                raise ConfigError("the request id belongs to another transaction: make a random one for each")
            return retried
        if len(offers) > self.config.limits.offers_max:
            raise OverLimit(
                f"{len(offers)} offers in one transaction: at most {self.config.limits.offers_max}"
            )
        self._txns.check_room()
        space = self.index.space(namespace_id)
        model_id = space.namespace.model_id
        epoch_id = self.epochs.id_of(model_id, epoch)
        if epoch_id == UNBOUND:
            raise EpochUnknown(f"epoch {epoch.number} of {model_id} is not registered with these weights")
        lease = self._holds.grant(owner, lease_s, space, (), now)
        txn_id = self._txns.next_id()
        txn = Txn(txn_id, owner, namespace_id, epoch, quality, lease, request_id, tuple(offers))
        self._txns.add(txn)
        self._offers.reserve(txn, space, epoch_id)
        return txn

    def txn(self, txn_id: TxnId, now: float) -> Txn:
        """Raises LeaseExpired when the transaction is over: committed, aborted, or its lease expired."""
        self._leases.observe(now)
        txn = self._txns.get(txn_id)
        if not self._txns.is_open(txn) or not self._leases.is_live(txn.lease, now):
            raise LeaseExpired(f"transaction {txn_id} is over or its lease expired: begin another")
        return txn

    def granted(self, txn: Txn, i: int) -> Version | None:
        """The version that offer i is to be written to; None when there is none: it exists or was refused."""
        return self.index.row(txn.slots[i]) if i in txn.staged else None

    def written(self, txn: Txn, i: int, refusal: Refusal | None, now: float) -> None:
        """The frame of offer i was stored, or refused on arrival. Renews the transaction's lease."""
        if i not in txn.staged:
            raise ConfigError(f"offer {i} of transaction {txn.id} was not granted: nothing to write")
        self._leases.touch(txn.lease, now)
        self._offers.written(txn, i, refusal)

    def commit(self, txn_id: TxnId, pin_for_s: float | None, now: float) -> Committed:
        """Make what was written visible at one revision. A retried commit gets the same answer."""
        answered = self._txns.get(txn_id).answer
        if answered is not None:
            return answered
        txn = self.txn(txn_id, now)
        space = self.index.space(txn.namespace)
        epoch_id = self.epochs.id_of(space.namespace.model_id, txn.epoch)
        revision = self.changes.advance()
        landed = [self._offers.land(txn, i, space, epoch_id, revision) for i in range(len(txn.slots))]
        kept = [slot for slot in landed if not isinstance(slot, Refusal)]
        refused = {i: refusal for i, refusal in enumerate(landed) if isinstance(refusal, Refusal)}
        slots = array("q", (NONE if isinstance(slot, Refusal) else slot for slot in landed))
        known = self.index.versions.generations
        generations = array("Q", (0 if slot == NONE else known[slot] for slot in slots))
        # The transaction's lease makes place for the reader's before its pins go: no block is ever unheld.
        pinned = self._holds.end(txn.lease)
        lease = self._holds.grant(txn.owner, pin_for_s, space, kept, now) if pin_for_s and kept else None
        answer = Committed(revision, slots, generations, refused, lease)
        self._txns.end(txn, answer)
        self.index.unpin(pinned)
        return answer

    def blocks(self, answer: Committed) -> tuple[BlockRef | Refusal, ...]:
        """One an offer: where its block is readable, or why it is not."""
        shard, incarnation = self.config.shard, self.config.incarnation
        places = enumerate(zip(answer.slots, answer.generations, strict=True))
        return tuple(answer.refused.get(i) or BlockRef(shard, incarnation, *place) for i, place in places)

    def abort(self, txn_id: TxnId) -> None:
        """Free what the transaction staged, or what its commit pinned. Idempotent."""
        txn = self._txns.find(txn_id)
        if txn is None:
            return
        if txn.answer is None:
            self.release([txn.lease])
        elif txn.answer.lease is not None:  # the writer never heard of its commit, nor of the pins it got
            self.release([txn.answer.lease])

    def restore(self, meta: BlockMeta, nbytes: int) -> BlockRef | None:
        """A block that the tier below kept since the shard's last life: see restoring.py.

        It is told of in listings alone: watches begin after what was restored."""
        if not self.revision:
            self.changes.advance()  # what was created at revision 0 would count as purged
        self.changes.forget(self.revision)
        return restore(self.index, self.epochs, meta, nbytes, self.revision)

    # -- deletion and upkeep -----------------------------------------------------------------------

    def report(self, version: Version) -> None:
        """The driver found the version's stored bytes corrupt: out of sight, so it can be written again."""
        slot = version.ref.slot
        if self.index.versions.is_current(slot, version.ref.generation) and self.index.is_live(slot):
            self.changes.advance()
            self.retiring.tell(ChangeKind.RETIRED, slot)
            self.index.retire(slot, self.revision, into=State.GONE)
            self.counters["retired_corrupt"] += 1

    def purge(
        self, namespace: NamespaceId, keys: tuple[BlockKey, ...] | None, epoch: int | None
    ) -> tuple[int, int]:
        """Delete for good: invisible to every snapshot when this returns. Versions and bytes freed so far;
        without `keys` the rest follows in `sweep`. An epoch that was never registered holds nothing."""
        space = self.index.space(namespace)
        if keys is not None and len(keys) > self.config.limits.keys_max:
            raise OverLimit(f"{len(keys)} keys in one purge: at most {self.config.limits.keys_max}")
        epoch_id = None
        if epoch is not None:
            epoch_id = self.epochs.of(space.namespace.model_id).bound.get(epoch)
            if epoch_id is None:
                return 0, 0
        self.counters["purges"] += 1
        if keys is not None:
            return self._purging.purge_keys(space, keys, epoch_id)
        self._purging.purge_space(space, epoch_id)
        return 0, 0

    def sweep(self, slots_max: int) -> int:
        """Free what was purged or dropped, looking at so many slots at most. How many are left to look at."""
        return self._purging.sweep(slots_max)

    # -- time and truth ----------------------------------------------------------------------------

    def reap(self, now: float) -> int:
        """Free what expired; how many leases did. To be called regularly, traffic or none."""
        self._leases.observe(now)
        past = self._leases.past_end(now)
        for lease in past:
            self.counters["expired:pin" if self._txns.of_lease(lease) is None else "expired:txn"] += 1
        self.release(past)
        return len(past)

    @property
    def leases(self) -> int:
        return len(self._leases)

    def oldest_pin_s(self, now: float) -> float:
        return self._leases.oldest_s(now)

    def usage(self) -> Usage:
        """Bytes by state from an independent walk; whatever is used beyond them has no owner."""
        return integrity.measure(self.index, self._holds.by_lease, self._leases.ids(), self._staged())

    def check_integrity(self) -> None:
        """Conservation: every slot, byte and pin has exactly the owner it should have."""
        self._txns.check_integrity()
        owned = {txn.lease for txn in self._txns.open_txns()}
        assert owned <= self._leases.ids(), "a transaction outlived its lease"
        integrity.check(self.index, self._holds.by_lease, self._leases.ids(), self._staged())

    # -- inside ------------------------------------------------------------------------------------

    def _staged(self) -> set[int]:
        """Slots whose bytes somebody is writing: transactions, and moves that encode."""
        every = {txn.slots[i] for txn in self._txns.open_txns() for i in txn.staged}
        return every | self.moves.staged()
