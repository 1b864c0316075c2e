"""One shard's state machine: synchronous, deterministic, without I/O.

Every method takes the time and answers at once; bytes are the driver's business. The driver writes and
reads the slots the core names, tells it what arrived (`written`) and what turned out corrupt (`report`),
and discards the slots in `index.freed`. All bounds are in `CoreLimits`.

What is held is always held by a lease: matches, transactions and commits that pin. `reap` frees what
expired, without any traffic.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from kvstore.core.chain import State, Version, visible
from kvstore.core.index import Index
from kvstore.core.leases import LeaseTable
from kvstore.core.seams import ReplacementPolicy
from kvstore.core.state import Committed, CoreConfig, Matched, Namespace, Offer, Txn, Usage
from kvstore.errors import ConfigError, EpochConflict, EpochUnknown, NotFound, OverLimit
from kvstore.nouns import (
    BlockKey,
    BlockRef,
    Epoch,
    LeaseId,
    MissReason,
    NamespaceId,
    Quality,
    Refusal,
    Revision,
    Snapshot,
    TxnId,
    WeightsDigest,
)


class ShardCore:
    def __init__(self, config: CoreConfig, make_policy: Callable[[], ReplacementPolicy]) -> None:
        limits = config.limits
        self.config = config
        self.index = Index(config.capacity_nbytes, limits.slots_max, make_policy)
        self.counters: Counter[str] = Counter()
        self.revision = 0
        self._namespaces: dict[NamespaceId, Namespace] = {}
        self._epochs: dict[str, dict[int, WeightsDigest]] = {}
        self._leases = LeaseTable(1, limits.leases_max, limits.lease_s_max, limits.pause_s)
        self._held: dict[LeaseId, list[Version]] = {}  # what each lease pins, in chain order
        self._txns: dict[TxnId, Txn] = {}
        self._txn_of_lease: dict[LeaseId, TxnId] = {}
        self._txn_of_request: dict[bytes, TxnId] = {}
        self._answers: OrderedDict[TxnId, Committed] = OrderedDict()
        self._next_txn = 1

    # -- namespaces and epochs ---------------------------------------------------------------------

    def open_namespace(self, namespace_id: NamespaceId, namespace: Namespace) -> None:
        """Make the namespace known. Idempotent."""
        if (
            namespace_id not in self._namespaces
            and len(self._namespaces) >= self.config.limits.namespaces_max
        ):
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
        known = self._epochs.setdefault(model_id, {})
        bound = known.get(epoch.number)
        if bound is not None and bound != epoch.weights_digest:
            raise EpochConflict(
                f"epoch {epoch.number} of {model_id} is bound to weights {bound.hex()}, not to "
                f"{epoch.weights_digest.hex()}: take the next number for new weights"
            )
        if bound is None and len(known) >= self.config.limits.epochs_max:
            raise OverLimit(f"{len(known)} epochs of {model_id} are registered: raise epochs_max")
        known[epoch.number] = epoch.weights_digest
        if len(known) == 1:
            self.index.set_current(model_id, epoch.number)

    def advance_epoch(self, model_id: str, number: int) -> Revision:
        """Make a registered epoch the current one. O(1): nothing is flushed, older versions go first."""
        if number not in self._epochs.get(model_id, {}):
            raise EpochUnknown(
                f"epoch {number} of {model_id} is not registered: register it with its weights"
            )
        self.index.set_current(model_id, number)
        return self._tick_revision()

    def is_registered(self, model_id: str, epoch: Epoch) -> bool:
        return self._epochs.get(model_id, {}).get(epoch.number) == epoch.weights_digest

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
        for key in keys if miss is None else ():
            seen = visible(self.index.chain(key), snapshot)
            if isinstance(seen, MissReason):
                miss = seen
                break
            run.append(seen)
        self.counters["match_keys"] += len(keys)
        self.counters["match_hits"] += len(run)
        if miss is not None:
            self.counters[f"miss:{miss.value}"] += 1
        lease = self._grant(owner, lease_s, run, now) if run else None
        return Matched(tuple(run), lease, miss)

    def resolve(self, ref: BlockRef) -> Version | MissReason:
        """The version behind a reference, if its bytes are still the ones it was taken of."""
        version = None
        if ref.incarnation == self.config.incarnation:
            version = self.index.at(ref.slot, ref.generation)
        if version is None or version.state is State.STAGED:
            self.counters[f"miss:{MissReason.STALE_REFERENCE.value}"] += 1
            return MissReason.STALE_REFERENCE
        return version

    def renew(self, lease: LeaseId, lease_s: float, now: float) -> bool:
        self._leases.observe(now)
        return self._leases.renew(lease, lease_s, now)

    def release(self, lease: LeaseId) -> None:
        """Drop a lease with its pins, or abort the transaction it holds. Idempotent."""
        if lease in self._txn_of_lease:
            self.abort(self._txn_of_lease[lease])
            return
        if self._leases.end(lease):
            for version in reversed(self._held.pop(lease)):  # tails first: they are to go first
                self.index.unpin(version, lease)

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
        retried = self._txn_of_request.get(request_id)
        if retried is not None:
            return self._txns[retried]
        limits = self.config.limits
        if len(offers) > limits.offers_max or len(self._txns) >= limits.txns_max:
            raise OverLimit(f"{len(offers)} offers, {len(self._txns)} open transactions: send less at a time")
        model_id = self.namespace(namespace_id).model_id
        if not self.is_registered(model_id, epoch):
            raise EpochUnknown(f"epoch {epoch.number} of {model_id} is not registered with these weights")
        lease = self._grant(owner, lease_s, [], now)
        txn = Txn(
            TxnId(self._next_txn), owner, namespace_id, epoch, quality, lease, request_id, tuple(offers)
        )
        self._next_txn += 1
        self._txns[txn.id] = txn
        self._txn_of_lease[lease] = txn.id
        self._txn_of_request[request_id] = txn.id
        for offer in offers:
            refusal, version = self._reserve(txn, model_id, offer)
            txn.refusals.append(refusal)
            txn.versions.append(version)
            if refusal is not None:
                self.counters[f"refusal:{refusal.value}"] += 1
        return txn

    def txn(self, txn_id: TxnId, now: float) -> Txn:
        """Raises NotFound when the transaction is over: committed, aborted, or its lease expired."""
        self._leases.observe(now)
        txn = self._txns.get(txn_id)
        if txn is None or not self._leases.is_live(txn.lease, now):
            raise NotFound(f"transaction {txn_id} is over or its lease expired: begin another")
        return txn

    def written(self, txn: Txn, index: int, refusal: Refusal | None) -> None:
        """The frame of offer `index` was stored, or refused on arrival."""
        version = txn.versions[index]
        if version is None or version.state is not State.STAGED:
            raise ConfigError(f"offer {index} of transaction {txn.id} was not granted: nothing to write")
        if refusal is None:
            version.written = True
            return
        self.counters[f"refusal:{refusal.value}"] += 1
        txn.refusals[index] = refusal
        txn.versions[index] = None
        self.index.drop(version)

    def commit(self, txn_id: TxnId, pin_for_s: float | None, now: float) -> Committed:
        """Make what was written visible at one revision. A retried commit gets the same answer."""
        if txn_id in self._answers:
            return self._answers[txn_id]
        txn = self.txn(txn_id, now)
        blocks: list[BlockRef | Refusal] = []
        kept: list[Version] = []
        revision = self._tick_revision().counter
        for i in range(len(txn.versions)):
            version = self._settle(txn, i, revision)
            if version is None:
                blocks.append(txn.refusals[i] or Refusal.UNWRITTEN)
            else:
                blocks.append(self.ref(version))
                kept.append(version)
        lease = self._grant(txn.owner, pin_for_s, kept, now) if pin_for_s and kept else None
        self._close(txn)
        answer = Committed(revision, tuple(blocks), lease)
        self._answers[txn_id] = answer
        if len(self._answers) > self.config.limits.answers_max:
            self._answers.popitem(last=False)
        return answer

    def abort(self, txn_id: TxnId) -> None:
        """Free what the transaction staged. Idempotent."""
        txn = self._txns.get(txn_id)
        if txn is None:
            return
        for version in txn.versions:
            if version is not None and version.state is State.STAGED:
                self.index.drop(version)
        self._close(txn)

    def report(self, version: Version) -> None:
        """The driver found the version's stored bytes corrupt: out of sight, so it can be written again."""
        if version.state is State.LIVE:
            self.index.retire(version, self._tick_revision().counter)
            self.counters["retired_corrupt"] += 1

    # -- time and truth ----------------------------------------------------------------------------

    def reap(self, now: float) -> int:
        """Free what expired; how many leases did. To be called regularly, traffic or none."""
        self._leases.observe(now)
        past = self._leases.past_end(now)
        for lease in past:
            self.counters["expired:txn" if lease in self._txn_of_lease else "expired:pin"] += 1
            self.release(lease)
        return len(past)

    @property
    def leases(self) -> int:
        return len(self._leases)

    def oldest_pin_s(self, now: float) -> float:
        return self._leases.oldest_s(now)

    def ref(self, version: Version) -> BlockRef:
        return BlockRef(self.config.shard, self.config.incarnation, version.slot, version.generation)

    def usage(self) -> Usage:
        """Bytes by state from an independent walk; whatever is used beyond them has no owner."""
        found = dict.fromkeys(State, 0)
        for version in self.index.versions():
            if version.state is State.LIVE or self._has_owner(version):
                found[version.state] += version.nbytes
        return Usage(
            live_nbytes=found[State.LIVE],
            staged_nbytes=found[State.STAGED],
            retired_nbytes=found[State.RETIRED],
            ownerless_nbytes=self.index.used_nbytes - sum(found.values()),
        )

    def check_integrity(self) -> None:
        """Conservation: every slot, byte and pin has exactly the owner it should have."""
        self.index.check_integrity()
        assert self.usage().ownerless_nbytes == 0, "bytes without an owner"
        assert set(self._held) == self._leases.ids(), "leases and what they hold disagree"
        pins = {(lease, id(v)) for lease, held in self._held.items() for v in held}
        walked = {(lease, id(v)) for v in self.index.versions() for lease in v.pins}
        assert pins == walked, "a pin without a lease, or a lease without its pin"
        staged = {id(v) for t in self._txns.values() for v in t.versions if v and v.state is State.STAGED}
        assert staged == {id(v) for v in self.index.versions() if v.state is State.STAGED}, "staging leaks"
        assert set(self._txn_of_lease.values()) == set(self._txns) == set(self._txn_of_request.values())

    # -- inside ------------------------------------------------------------------------------------

    def _has_owner(self, version: Version) -> bool:
        if version.state is State.STAGED:
            return any(version in txn.versions for txn in self._txns.values())
        return any(lease in self._leases for lease in version.pins)

    def _cannot_read_at(self, snapshot: Snapshot) -> MissReason | None:
        revision = snapshot.revision
        foreign = revision is not None and revision.incarnation != self.config.incarnation
        return MissReason.COMPACTED if foreign else None

    def _tick_revision(self) -> Revision:
        self.revision += 1
        return Revision(self.config.incarnation, self.revision)

    def _grant(self, owner: str, lease_s: float, pinned: list[Version], now: float) -> LeaseId:
        lease = self._leases.grant(owner, lease_s, now)
        self._held[lease] = []
        for version in pinned:
            self._hold(lease, version)
        return lease

    def _hold(self, lease: LeaseId, version: Version) -> None:
        if lease not in version.pins:
            self.index.pin(version, lease)
            self._held[lease].append(version)

    def _reserve(self, txn: Txn, model_id: str, offer: Offer) -> tuple[Refusal | None, Version | None]:
        rivals = [v for v in self.index.chain(offer.key) if v.epoch == txn.epoch and v.quality >= txn.quality]
        live = next((v for v in rivals if v.state is State.LIVE), None)
        if live is not None:
            self._hold(txn.lease, live)
            return Refusal.EXISTS, live
        if any(v.state is State.STAGED for v in rivals):
            return Refusal.STAGED, None
        if not self.index.make_room(offer.nbytes, self._evict):
            return Refusal.NO_SPACE, None
        version = Version(
            offer.key, offer.parent, offer.chain_index, offer.placement,
            model_id, txn.epoch, txn.quality, slot=-1, generation=-1, nbytes=offer.nbytes,
        )  # fmt: skip
        self.index.stage(version, txn.owner)
        return None, version

    def _evict(self, version: Version) -> None:
        self.index.retire(version, self._tick_revision().counter)
        self.counters["evicted"] += 1

    def _settle(self, txn: Txn, i: int, revision: int) -> Version | None:
        """Offer i at commit: its staged version if its bytes are there, the one that exists, or None."""
        version = txn.versions[i]
        if version is None or version.state is not State.STAGED:
            return version
        if not version.written:
            txn.refusals[i] = Refusal.UNWRITTEN
            txn.versions[i] = None
            self.counters[f"refusal:{Refusal.UNWRITTEN.value}"] += 1
            self.index.drop(version)
            return None
        self.index.publish(version, revision)
        self.counters["committed"] += 1
        return version

    def _close(self, txn: Txn) -> None:
        del self._txns[txn.id], self._txn_of_lease[txn.lease], self._txn_of_request[txn.request_id]
        self.release(txn.lease)
