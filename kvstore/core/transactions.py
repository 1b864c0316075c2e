"""Transactions: what one owner is writing, invisible to all others until its commit.

A transaction lives as long as its lease; every frame that arrives renews it. The table remembers the
answers of the last `answers_max` transactions that ended, so that a begin or a commit whose answer was lost
can be asked again: the same request id is the same transaction, for as long as that memory reaches.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from kvstore.core.ids import Ids
from kvstore.core.state import Committed, Offer
from kvstore.errors import LeaseExpired, OverLimit
from kvstore.nouns import Epoch, LeaseId, NamespaceId, Quality, Refusal, TxnId


@dataclass(slots=True, eq=False)
class Txn:
    """`slots[i]` holds offer i's own staged version (then i is in `staged`) or, where it was refused as
    EXISTS, the version that exists, pinned under the txn's lease; NONE where it was refused for good."""

    id: TxnId
    owner: str
    namespace: NamespaceId
    epoch: Epoch
    quality: Quality
    lease: LeaseId
    request_id: bytes
    offers: tuple[Offer, ...]
    refused: dict[int, Refusal] = field(default_factory=dict)  # by offer
    slots: list[int] = field(default_factory=list)
    staged: set[int] = field(default_factory=set)
    answer: Committed | None = None  # once it is committed

    @property
    def refusals(self) -> list[Refusal | None]:
        """One an offer, also of a transaction that was committed."""
        count = len(self.offers) if self.answer is None else len(self.answer.slots)
        return [self.refused.get(i) for i in range(count)]


class TxnTable:
    def __init__(self, ids: Ids, txns_max: int, answers_max: int) -> None:
        self._open: dict[TxnId, Txn] = {}
        self._ended: OrderedDict[TxnId, Txn] = OrderedDict()
        self._of_lease: dict[LeaseId, Txn] = {}
        self._of_request: dict[bytes, Txn] = {}  # open and ended
        self._ids = ids
        self._txns_max = txns_max
        self._answers_max = answers_max

    def __len__(self) -> int:
        return len(self._open)

    def open_txns(self) -> list[Txn]:
        return list(self._open.values())

    def check_room(self) -> None:
        """Raises OverLimit when no more transaction may be opened."""
        if len(self._open) >= self._txns_max:
            raise OverLimit(
                f"{len(self._open)} transactions are open on this shard: try again, or raise txns_max"
            )

    def next_id(self) -> TxnId:
        return TxnId(self._ids.next())

    def add(self, txn: Txn) -> None:
        self._open[txn.id] = self._of_lease[txn.lease] = self._of_request[txn.request_id] = txn

    def of_request(self, request_id: bytes) -> Txn | None:
        return self._of_request.get(request_id)

    def of_lease(self, lease: LeaseId) -> Txn | None:
        return self._of_lease.get(lease)

    def is_open(self, txn: Txn) -> bool:
        return txn.id in self._open

    def get(self, txn_id: TxnId) -> Txn:
        """As `find`. Raises LeaseExpired."""
        txn = self.find(txn_id)
        if txn is None:
            raise LeaseExpired(f"transaction {txn_id} is over or its lease expired: begin another")
        return txn

    def find(self, txn_id: TxnId) -> Txn | None:
        """An open transaction, or one that was committed and is remembered."""
        return self._open.get(txn_id) or self._ended.get(txn_id)

    def end(self, txn: Txn, answer: Committed | None) -> None:
        """Close a transaction. Only one that was committed is remembered, without what it offered."""
        del self._open[txn.id], self._of_lease[txn.lease]
        txn.answer = answer
        txn.offers, txn.slots, txn.staged = (), [], set()
        if answer is None:
            del self._of_request[txn.request_id]
            return
        self._ended[txn.id] = txn
        if len(self._ended) > self._answers_max:
            _, forgotten = self._ended.popitem(last=False)
            del self._of_request[forgotten.request_id]

    def check_integrity(self) -> None:
        assert {t.lease for t in self._open.values()} == set(self._of_lease), (
            "a transaction without its lease"
        )
        known = {id(t) for t in (*self._open.values(), *self._ended.values())}
        assert {id(t) for t in self._of_request.values()} == known, "requests and transactions disagree"
