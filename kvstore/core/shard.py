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
from collections.abc import Container, Sequence

from kvstore.core import integrity
from kvstore.core.chain import run_of, view_of
from kvstore.core.changes import ChangeLog
from kvstore.core.epochs import UNBOUND, EpochTable
from kvstore.core.holds import Holds
from kvstore.core.ids import Ids
from kvstore.core.index import Index
from kvstore.core.leases import LeaseTable
from kvstore.core.listing import list_page
from kvstore.core.offers import Offers
from kvstore.core.purging import Purging
from kvstore.core.seams import MakePolicy
from kvstore.core.spaces import Space
from kvstore.core.state import Committed, CoreConfig, Matched, Namespace, Offer, Usage
from kvstore.core.transactions import Txn, TxnTable
from kvstore.core.versions import NONE, State, Version, gather
from kvstore.errors import Compacted, ConfigError, EpochUnknown, LeaseExpired, NotFound, OverLimit
from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    BlockRef,
    Change,
    ChangeKind,
    Epoch,
    EpochPolicy,
    LeaseId,
    Listed,
    MissReason,
    NamespaceId,
    Quality,
    Refusal,
    Revision,
    Snapshot,
    TxnId,
)

_MISS_LABEL = {reason: f"miss:{reason.value}" for reason in MissReason}


class ShardCore:
    def __init__(self, config: CoreConfig, make_policy: MakePolicy) -> None:
        limits = config.limits
        ids = Ids(config.incarnation, config.id_secret)
        self.config = config
        self.epochs = EpochTable(limits.models_max, limits.epochs_max)
        self.index = Index(config, make_policy, self.epochs)
        self.counters: Counter[str] = Counter()
        self.changes = ChangeLog(limits.changes_max)
        self._leases = LeaseTable(ids, limits.leases_max, limits.lease_s_max, limits.pause_s)
        self._holds = Holds(self._leases, self.index)
        self._txns = TxnTable(ids, limits.txns_max, limits.answers_max)
        self._offers = Offers(self.index, self.epochs, self._holds, self.changes, self.counters)
        self._purging = Purging(self.index, self.epochs, self.changes, self.counters)
        self._horizon = 0  # no snapshot of an older revision is answered

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
        return self._space(namespace_id).namespace

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
        return self._at(self.revision)

    # -- reading -----------------------------------------------------------------------------------

    def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, now: float
    ) -> Matched:
        """The longest prefix run of `keys` the snapshot sees, pinned in the same step."""
        if len(keys) > self.config.limits.keys_max:
            raise OverLimit(f"{len(keys)} keys in one match: at most {self.config.limits.keys_max}")
        space = self._space(snapshot.namespace)
        self._leases.observe(now)
        run: list[int] = []
        miss = self._cannot_read_at(snapshot.revision)
        if miss is None:
            view = view_of(snapshot, space.namespace.model_id, self.epochs)
            if isinstance(view, MissReason):
                miss = view if keys else None
            else:
                run, miss = run_of(keys, view, space, self.index.versions, self.epochs)
        lease = self._holds.grant(owner, lease_s, space, run, now) if run else None
        self.counters["match_keys"] += len(keys)
        self.counters["match_hits"] += len(run)
        if miss is not None:
            self.counters[_MISS_LABEL[miss]] += 1
        table = self.index.versions
        return Matched(
            run,
            gather(table.generations, run),
            gather(table.epochs, run),
            gather(table.qualities, run),
            gather(table.tiers, run),
            gather(table.nbytes, run),
            lease,
            miss,
        )

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

    def listing(
        self, namespace: NamespaceId, at: Revision | None, cursor: int, limit: int
    ) -> tuple[Revision, list[Listed], int]:
        """Versions that stand at a revision (None: now), the slots from `cursor` on; where to go on, or 0.

        What is evicted between two pages is missing from the second, and in the watch. Raises Compacted.
        """
        space = self._space(namespace)
        counter = self.revision if at is None else at.counter
        if self._cannot_read_at(at) is not None or counter < space.purged_last:
            raise Compacted(f"what stood at {at} is not known any more: list at the latest revision")
        versions_max = max(1, min(limit, self.config.limits.page_max))
        found, stopped = list_page(self.index, self.epochs, space, counter, cursor, versions_max)
        return self._at(counter), found, stopped

    def changed_since(
        self, after: Revision | None, namespaces: Container[NamespaceId], changes_max: int
    ) -> tuple[Revision, list[Change]]:
        """Changes after a revision (None: none yet, watch from now on), complete up to the one answered.

        Raises Compacted for a revision of another incarnation or below the horizon.
        """
        if after is None:
            return self._at(self.revision), []
        if after.incarnation != self.config.incarnation or not (
            self.changes.horizon <= after.counter <= self.revision
        ):
            raise Compacted(f"changes after {after} are not known: list, and watch from that revision")
        found, upto = self.changes.since(after.counter, namespaces, changes_max)
        return self._at(upto), found

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
        space = self._space(namespace_id)
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
        space = self._space(txn.namespace)
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

    # -- deletion and upkeep -----------------------------------------------------------------------

    def report(self, version: Version) -> None:
        """The driver found the version's stored bytes corrupt: out of sight, so it can be written again."""
        slot = version.ref.slot
        if self.index.versions.is_current(slot, version.ref.generation) and self.index.is_live(slot):
            self.changes.advance()
            number, quality = version.epoch.number, int(version.quality)
            self.changes.add(ChangeKind.RETIRED, version.namespace, version.key, number, quality)
            self.index.retire(slot, self.revision, into=State.GONE)
            self.counters["retired_corrupt"] += 1

    def purge(
        self, namespace: NamespaceId, keys: tuple[BlockKey, ...] | None, epoch: int | None
    ) -> tuple[int, int]:
        """Delete for good: invisible to every snapshot when this returns. Versions and bytes freed so far;
        without `keys` the rest follows in `sweep`. An epoch that was never registered holds nothing."""
        space = self._space(namespace)
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

    def compact(self, revision: Revision) -> Revision:
        """Forget what only snapshots and watches below a revision need. The horizon from here on.

        Raises Compacted for a revision of another incarnation, ConfigError for one that is still to come.
        """
        if revision.incarnation != self.config.incarnation:
            raise Compacted(f"{revision} is of another life of {self.config.shard}: all of it is forgotten")
        if revision.counter > self.revision:
            raise ConfigError(f"revision {revision.counter} is still to come: {self.revision} is the latest")
        self._horizon = max(self._horizon, revision.counter)
        self.changes.forget(self._horizon)
        for space in self.index.by_index:
            old = [key for key, horizon in space.horizons.items() if horizon <= self._horizon]
            for key in old:
                del space.horizons[key]
        return self._at(self._horizon)

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
        return integrity.measure(self.index, self._holds.by_lease, self._leases.ids(), self._txns)

    def check_integrity(self) -> None:
        """Conservation: every slot, byte and pin has exactly the owner it should have."""
        integrity.check(self.index, self._holds.by_lease, self._leases.ids(), self._txns)

    # -- inside ------------------------------------------------------------------------------------

    def _space(self, namespace_id: NamespaceId) -> Space:
        space = self.index.spaces.get(namespace_id)
        if space is None:
            raise NotFound(
                f"namespace {namespace_id.hex()} is not open on {self.config.shard}: open it first"
            )
        return space

    def _at(self, counter: int) -> Revision:
        return Revision(self.config.incarnation, counter)

    def _cannot_read_at(self, at: Revision | None) -> MissReason | None:
        if at is None:
            return None
        if at.incarnation != self.config.incarnation or at.counter < self._horizon:
            return MissReason.COMPACTED
        return MissReason.NOT_YET if at.counter > self.revision else None  # it would gain: never
