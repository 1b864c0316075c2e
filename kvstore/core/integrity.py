"""Conservation, found by a walk that trusts none of the totals kept on the way.

Every byte is live, or somebody's: staged by an open transaction or pinned by a lease that stands. The cost
is one pass over all versions (about 1 ms a thousand): for `status`, idle moments and the end of tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from kvstore.core.chain import State, Version
from kvstore.core.index import Index
from kvstore.core.state import Usage
from kvstore.core.transactions import TxnTable
from kvstore.nouns import LeaseId

Held = Mapping[LeaseId, Sequence[Version]]


def measure(index: Index, held: Held, leases: Set[LeaseId], txns: TxnTable) -> Usage:
    """Bytes by state; what is used beyond those with an owner is ownerless, and a bug."""
    owned = _staged(txns) | {id(v) for lease, pinned in held.items() if lease in leases for v in pinned}
    found = dict.fromkeys(State, 0)
    for version in index.versions():
        if version.state is State.LIVE or id(version) in owned:
            found[version.state] += version.nbytes
    return Usage(
        live_nbytes=found[State.LIVE],
        staged_nbytes=found[State.STAGED],
        retired_nbytes=found[State.RETIRED] + found[State.CORRUPT],
        ownerless_nbytes=index.used_nbytes - sum(found.values()),
    )


def check(index: Index, held: Held, leases: Set[LeaseId], txns: TxnTable) -> None:
    """Raises AssertionError: every slot, byte and pin has exactly the owner it should have."""
    index.check_integrity()
    txns.check_integrity()
    assert measure(index, held, leases, txns).ownerless_nbytes == 0, "bytes without an owner"
    assert set(held) == leases, "leases and what they hold disagree"
    assert {txn.lease for txn in txns.open_txns()} <= leases, "a transaction outlived its lease"
    pins = Counter(id(version) for pinned in held.values() for version in pinned)
    walked = {id(version): version.pins for version in index.versions() if version.pins}
    assert pins == walked, "a pin without a lease, or a lease without its pin"
    staged = {id(version) for version in index.versions() if version.state is State.STAGED}
    assert staged == _staged(txns), "staged bytes and transactions disagree"


def _staged(txns: TxnTable) -> set[int]:
    every = (version for txn in txns.open_txns() for version in txn.versions)
    return {id(version) for version in every if version is not None and version.state is State.STAGED}
