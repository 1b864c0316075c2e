"""One shard's state machine: synchronous, deterministic, without I/O.

Every method takes the time and answers at once; bytes are the driver's business. The driver writes and
reads the slots the core names, tells it what arrived (`written`) and what turned out corrupt (`report`),
and discards what `index.freed` names. All bounds are in `CoreLimits`.

What is held is always held by a lease: matches, transactions and commits that pin. `reap` frees what
expired, without any traffic. Lease and transaction ids start from the incarnation, so that one of an
earlier life of the shard never names somebody else's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from kvstore.core import integrity
from kvstore.core.chain import NO_CHAIN, State, Version, visible
from kvstore.core.epochs import EpochTable
from kvstore.core.index import Index
from kvstore.core.leases import LeaseTable
from kvstore.core.seams import ReplacementPolicy
from kvstore.core.state import Committed, CoreConfig, Matched, Namespace, Offer, Usage
from kvstore.core.transactions import Txn, TxnTable
from kvstore.errors import ConfigError, EpochUnknown, LeaseExpired, NotFound, OverLimit
from kvstore.nouns import (
    BlockKey,
    BlockRef,
    Epoch,
    Incarnation,
    LeaseId,
    MissReason,
    NamespaceId,
    Quality,
    Refusal,
    Revision,
    Snapshot,
    TxnId,
)

_MISS_LABEL = {reason: f"miss:{reason.value}" for reason in MissReason}
_REFUSAL_LABEL = {reason: f"refusal:{reason.value}" for reason in Refusal}


class ShardCore:
    def __init__(self, config: CoreConfig, make_policy: Callable[[], ReplacementPolicy]) -> None:
        limits = config.limits
        first_id = _first_id(config.incarnation)
        self.config = config
        self.epochs = EpochTable(limits.models_max, limits.epochs_max)
        self.index = Index(config.capacity_nbytes, limits.slots_max, make_policy, self.epochs.lag)
        self.counters: Counter[str] = Counter()
        self.revision = 0
        self._namespaces: dict[NamespaceId, Namespace] = {}
        self._leases = LeaseTable(first_id, limits.leases_max, limits.lease_s_max, limits.pause_s)
        self._held: dict[LeaseId, list[Version]] = {}  # what each lease pins
        self._txns = TxnTable(first_id, limits.txns_max, limits.answers_max)

    # -- namespaces and epochs ---------------------------------------------------------------------

    def open_namespace(self, namespace_id: NamespaceId, namespace: Namespace) -> None:
        """Make the namespace known. Idempotent."""
        known = namespace_id in self._namespaces
        if not known and len(self._namespaces) >= self.config.limits.namespaces_max:
            raise OverLimit(f"{len(self._namespaces)} namespaces are open: raise namespaces_max")
        self._namespaces[namespace_id] = namespace

    def namespace(self, namespace_id: NamespaceId) -> Namespace:
        """Raises NotFound: the shard restarted since, open it again."""
        found = self._namespaces.get(namespace_id)
        if found is None:
            raise NotFound(
                f"namespace {namespace_id.hex()} is not open on {self.config.shard}: open it first"
            )
        return found

    def register_epoch(self, model_id: str, epoch: Epoch) -> None:
        """Bind a number to weights, for ever. The first epoch of a model is its current one."""
        self.epochs.register(model_id, epoch)

    def advance_epoch(self, model_id: str, number: int) -> Revision:
        """Make a registered epoch the current one. O(1): nothing is flushed, older versions go first."""
        if self.epochs.advance(model_id, number):
            self.revision += 1
        return Revision(self.config.incarnation, self.revision)

    # -- reading -----------------------------------------------------------------------------------

    def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, now: float
    ) -> Matched:
        """The longest prefix run of `keys` the snapshot sees, pinned in the same step."""
        if len(keys) > self.config.limits.keys_max:
            raise OverLimit(f"{len(keys)} keys in one match: at most {self.config.limits.keys_max}")
        self.namespace(snapshot.namespace)
        self._leases.observe(now)
        run: list[Version] = []
        miss = self._cannot_read_at(snapshot)
        chains = self.index.chains(snapshot.namespace)
        for key in keys if miss is None else ():
            seen = visible(chains.get(key, NO_CHAIN), snapshot)
            if isinstance(seen, MissReason):
                miss = seen
                break
            run.append(seen)
        lease = self._grant(owner, lease_s, run, now) if run else None
        self.counters["match_keys"] += len(keys)
        self.counters["match_hits"] += len(run)
        if miss is not None:
            self.counters[_MISS_LABEL[miss]] += 1
        return Matched(tuple(run), lease, miss)

    def resolve(self, namespace: NamespaceId, ref: BlockRef) -> Version | MissReason:
        """The version behind a reference, if its bytes are still the ones it was taken of, and in the
        namespace it was taken in."""
        version = None
        if (ref.shard, ref.incarnation) == (self.config.shard, self.config.incarnation):
            version = self.index.at(ref.slot, ref.generation)
        if version is None or version.state is State.STAGED or version.namespace != namespace:
            self.counters[_MISS_LABEL[MissReason.STALE_REFERENCE]] += 1
            return MissReason.STALE_REFERENCE
        return version

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
        let_go: list[Version] = []
        for lease in leases:
            txn = self._txns.of_lease(lease)
            if txn is not None:
                self._drop_staged(txn)
                self._txns.end(txn, None)
            if self._leases.end(lease):
                let_go += self._held.pop(lease)
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
        model_id = self.namespace(namespace_id).model_id
        if not self.epochs.is_registered(model_id, epoch):
            raise EpochUnknown(f"epoch {epoch.number} of {model_id} is not registered with these weights")
        lease = self._grant(owner, lease_s, [], now)
        txn_id = self._txns.next_id()
        txn = Txn(txn_id, owner, namespace_id, epoch, quality, lease, request_id, tuple(offers))
        self._txns.add(txn)
        self._reserve_all(txn, model_id)
        return txn

    def txn(self, txn_id: TxnId, now: float) -> Txn:
        """Raises LeaseExpired when the transaction is over: committed, aborted, or its lease expired."""
        self._leases.observe(now)
        txn = self._txns.get(txn_id)
        if not self._txns.is_open(txn) or not self._leases.is_live(txn.lease, now):
            raise LeaseExpired(f"transaction {txn_id} is over or its lease expired: begin another")
        return txn

    def written(self, txn: Txn, index: int, refusal: Refusal | None, now: float) -> None:
        """The frame of offer `index` was stored, or refused on arrival. Renews the transaction's lease."""
        version = txn.versions[index] if 0 <= index < len(txn.versions) else None
        if version is None or version.state is not State.STAGED:
            raise ConfigError(f"offer {index} of transaction {txn.id} was not granted: nothing to write")
        self._leases.touch(txn.lease, now)
        if refusal is None:
            version.written = True
        elif not version.written:  # a second copy that arrived broken takes nothing from the first
            self._refuse(txn, index, refusal)

    def commit(self, txn_id: TxnId, pin_for_s: float | None, now: float) -> Committed:
        """Make what was written visible at one revision. A retried commit gets the same answer."""
        answered = self._txns.get(txn_id).answer
        if answered is not None:
            return answered
        txn = self.txn(txn_id, now)
        self.revision += 1
        landed = [self._land(txn, i, self.revision) for i in range(len(txn.versions))]
        kept = [version for version in landed if isinstance(version, Version)]
        blocks = tuple(v.ref if isinstance(v, Version) else v for v in landed)
        # The transaction's lease makes place for the reader's before its pins go: no block is ever unheld.
        self._leases.end(txn.lease)
        pinned = self._held.pop(txn.lease)
        lease = self._grant(txn.owner, pin_for_s, kept, now) if pin_for_s and kept else None
        answer = Committed(self.revision, blocks, lease)
        self._txns.end(txn, answer)
        self.index.unpin(pinned)
        return answer

    def abort(self, txn_id: TxnId) -> None:
        """Free what the transaction staged, or what its commit pinned. Idempotent."""
        txn = self._txns.find(txn_id)
        if txn is None:
            return
        if txn.answer is None:
            self.release([txn.lease])
        elif txn.answer.lease is not None:  # the writer never heard of its commit, nor of the pins it got
            self.release([txn.answer.lease])

    def report(self, version: Version) -> None:
        """The driver found the version's stored bytes corrupt: out of sight, so it can be written again."""
        if version.state is State.LIVE:
            self.revision += 1
            self.index.retire(version, self.revision, into=State.CORRUPT)
            self.counters["retired_corrupt"] += 1

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
        return integrity.measure(self.index, self._held, self._leases.ids(), self._txns)

    def check_integrity(self) -> None:
        """Conservation: every slot, byte and pin has exactly the owner it should have."""
        integrity.check(self.index, self._held, self._leases.ids(), self._txns)

    # -- inside ------------------------------------------------------------------------------------

    def _cannot_read_at(self, snapshot: Snapshot) -> MissReason | None:
        at = snapshot.revision
        if at is None:
            return None
        if at.incarnation != self.config.incarnation:
            return MissReason.COMPACTED
        return MissReason.NOT_YET if at.counter > self.revision else None  # it would gain: never

    def _grant(self, owner: str, lease_s: float, pinned: Sequence[Version], now: float) -> LeaseId:
        lease = self._leases.grant(owner, lease_s, now)
        self._held[lease] = list(pinned)
        for version in pinned:
            self.index.pin(version)
        return lease

    def _hold(self, lease: LeaseId, version: Version) -> None:
        self.index.pin(version)
        self._held[lease].append(version)

    def _rivals(self, txn: Txn, key: BlockKey) -> list[Version]:
        """Versions of the key that make offering it again pointless: same epoch, as good or better."""
        chain = self.index.chain(txn.namespace, key).versions
        return [v for v in chain if v.epoch == txn.epoch and v.quality >= txn.quality]

    def _reserve_all(self, txn: Txn, model_id: str) -> None:
        for offer in txn.offers:  # pins first, so that making room for one offer evicts none of the others
            live = next((v for v in self._rivals(txn, offer.key) if v.state is State.LIVE), None)
            if live is not None:
                self._hold(txn.lease, live)
            txn.versions.append(live)
            txn.refusals.append(None if live is None else Refusal.EXISTS)
        for i, offer in enumerate(txn.offers):
            if txn.versions[i] is None:
                staged = self._reserve(txn, model_id, offer)
                if isinstance(staged, Version):
                    txn.versions[i] = staged
                else:
                    txn.refusals[i] = staged
        for refusal in filter(None, txn.refusals):
            self.counters[_REFUSAL_LABEL[refusal]] += 1

    def _reserve(self, txn: Txn, model_id: str, offer: Offer) -> Version | Refusal:
        if offer.nbytes < 1:
            return Refusal.MISMATCH
        if any(v.state is State.STAGED for v in self._rivals(txn, offer.key)):
            return Refusal.STAGED
        if not self.index.can_make_room(offer.nbytes):
            return Refusal.NO_SPACE
        while (victim := self.index.next_victim(offer.nbytes)) is not None:
            self.revision += 1
            self.index.retire(victim, self.revision)
            self.counters["evicted"] += 1
        slot, generation = self.index.take_slot(txn.owner)
        version = Version(
            txn.namespace, offer.key, offer.parent, offer.chain_index, offer.placement, model_id,
            txn.epoch, txn.quality,
            ref=BlockRef(self.config.shard, self.config.incarnation, slot, generation),
            nbytes=offer.nbytes,
        )  # fmt: skip
        self.index.stage(version)
        return version

    def _land(self, txn: Txn, i: int, revision: int) -> Version | Refusal:
        """Offer i at commit: where its block is readable, or why it is not."""
        version = txn.versions[i]
        if version is None:
            return txn.refusals[i] or Refusal.UNWRITTEN
        if version.state is State.CORRUPT:  # it existed at begin, and was found corrupt since
            return Refusal.CHECKSUM
        if version.state is not State.STAGED:
            return version
        if not version.written:
            self._refuse(txn, i, Refusal.UNWRITTEN)
            return Refusal.UNWRITTEN
        return self._publish(txn, version, revision)

    def _publish(self, txn: Txn, version: Version, revision: int) -> Version:
        """The first commit of (key, epoch, quality) wins, a better one too; it retires the lesser ones."""
        winner = next((v for v in self._rivals(txn, version.key) if v.state is State.LIVE), None)
        if winner is not None:
            self._hold(txn.lease, winner)
            self.index.drop(version)
            return winner
        for lesser in list(self.index.chain(txn.namespace, version.key).versions):
            if lesser.state is State.LIVE and lesser.epoch == version.epoch:
                self.index.retire(lesser, revision)
        self._hold(txn.lease, version)
        self.index.publish(version, revision)
        self.counters["committed"] += 1
        return version

    def _refuse(self, txn: Txn, i: int, refusal: Refusal) -> None:
        """Give up the slot of offer i."""
        version = txn.versions[i]
        assert version is not None, "only what was granted can be refused later"
        self.counters[_REFUSAL_LABEL[refusal]] += 1
        txn.refusals[i] = refusal
        txn.versions[i] = None
        self.index.drop(version)

    def _drop_staged(self, txn: Txn) -> None:
        for version in txn.versions:
            if version is not None and version.state is State.STAGED:
                self.index.drop(version)


def _first_id(incarnation: Incarnation) -> int:
    """Ids fit 63 bits: the lower half of the incarnation, then a count."""
    return (incarnation % (1 << 31)) << 32 | 1
