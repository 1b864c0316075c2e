"""Which anomalies of concurrent transactions can happen here: Hermitage's cases as a table.

After Martin Kleppmann's Hermitage (cases) and Adya's thesis (their names), told for a store whose values
never change: a "write" of a key is the commit of a better version, a "read" is a match. What a fixed
revision shows may shrink to a miss, which is legal here, and never becomes something else. What is not
prevented is shown to happen: docs/design.md says so too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.nouns import BlockRef, Refusal, Revision
from tests.kvstore.core.conftest import INT8, LOSSLESS, NAMESPACE, Found, Shard

X, Y = 0, 100
Case = Callable[[Shard], bool]


def seen(shard: Shard, n: int, at: Revision | None = None) -> str | None:
    """What a reader gets for key n: the quality's name tells the first write from the second."""
    found: Found = shard.match([n], min_quality=INT8, at=at)
    return found.versions[0].quality.name if found.versions else None


def first(shard: Shard) -> None:
    shard.put([X], quality=INT8)
    shard.put([Y], quality=INT8)


def g0_write_cycles(shard: Shard) -> bool:
    """Two writers interleave over x and y: can x come from one and y from the other?"""
    one, two = shard.begin([X]), shard.begin([Y])
    also_one, also_two = shard.begin([Y]), shard.begin([X])
    assert (also_one.refusals, also_two.refusals) == ([Refusal.STAGED], [Refusal.STAGED])
    for txn in (one, two):
        shard.write(txn)
        shard.commit(txn)
    return any(isinstance(block, BlockRef) for txn in (also_one, also_two) for block in shard.commit(txn))


def g1a_aborted_reads(shard: Shard) -> bool:
    txn = shard.begin([X])
    shard.write(txn)
    before = seen(shard, X)
    shard.core.abort(txn.id)
    return before is not None or seen(shard, X) is not None


def g1b_intermediate_reads(shard: Shard) -> bool:
    """A frame of a transaction that arrived, but whose others did not yet."""
    txn = shard.begin([X, X + 1])
    shard.core.written(txn, 0, None, shard.now)
    return seen(shard, X) is not None


def g1c_circular_information_flow(shard: Shard) -> bool:
    one, two = shard.begin([X]), shard.begin([Y])
    shard.write(one)
    shard.write(two)
    return seen(shard, Y) is not None or seen(shard, X) is not None


def otv_observed_transaction_vanishes(shard: Shard) -> bool:
    """Who saw one block of a commit at a revision sees the other there as well, whatever comes later."""
    first(shard)
    txn = shard.begin([X, Y], quality=LOSSLESS)
    shard.write(txn)
    before = shard.revision()
    shard.match([X], min_quality=INT8, at=before)
    shard.match([Y], min_quality=INT8, at=before)
    shard.commit(txn)
    after = shard.revision()
    torn_before = (seen(shard, X, before), seen(shard, Y, before)) != ("INT8", "INT8")
    torn_after = (seen(shard, X, after), seen(shard, Y, after)) != ("LOSSLESS", "LOSSLESS")
    return torn_before or torn_after


def pmp_predicate_many_preceders(shard: Shard) -> bool:
    """A listing at a revision, asked for again after a commit that it would have named."""
    first(shard)
    at, listed, _ = shard.core.past.listing(NAMESPACE, None, 0, 100)
    shard.put([X + 1, Y + 1])
    again = shard.core.past.listing(NAMESPACE, at, 0, 100)[1]
    return again != listed


def p4_lost_update(shard: Shard) -> bool:
    """Both saw x missing and both write it: is one told that it wrote what the other's write replaced?"""
    one, two = shard.begin([X]), shard.begin([X])
    shard.write(one)
    (block,) = shard.commit(one)
    answer = shard.commit(two)
    return answer != (Refusal.STAGED,) or shard.match([X]).versions[0].ref != block


def g_single_read_skew(shard: Shard) -> bool:
    """x is read before, y after a commit that wrote both."""
    first(shard)
    at = shard.revision()
    x = seen(shard, X, at)
    txn = shard.begin([X, Y], quality=LOSSLESS)
    shard.write(txn)
    shard.commit(txn)
    y = seen(shard, Y, at)
    assert y in ("INT8", None)  # nobody had pinned it: a miss is legal
    return (x, y) == ("INT8", "LOSSLESS")


def g2_item_write_skew(shard: Shard) -> bool:
    """Each reads what the other is about to write, and both commit."""
    one, two = shard.begin([X]), shard.begin([Y])
    assert seen(shard, Y) is seen(shard, X) is None
    return all(_lands(shard, txn) for txn in (one, two))


def g2_anti_dependency_cycles(shard: Shard) -> bool:
    """The same with a predicate: each lists, sees nothing, and adds to what the other listed."""
    listings = [shard.core.past.listing(NAMESPACE, None, 0, 100)[1] for _ in range(2)]
    assert listings == [[], []]
    return all(_lands(shard, shard.begin([n])) for n in (X, Y))


def _lands(shard: Shard, txn: object) -> bool:
    shard.write(txn)  # type: ignore[arg-type]
    return isinstance(shard.commit(txn)[0], BlockRef)  # type: ignore[arg-type]


CASES: dict[Case, bool] = {
    g0_write_cycles: False,
    g1a_aborted_reads: False,
    g1b_intermediate_reads: False,
    g1c_circular_information_flow: False,
    otv_observed_transaction_vanishes: False,
    pmp_predicate_many_preceders: False,
    p4_lost_update: False,
    g_single_read_skew: False,
    g2_item_write_skew: True,
    g2_anti_dependency_cycles: True,
}
"""Can it happen? Snapshot isolation on one shard: write skew can; blocks that never change do not mind."""


@pytest.mark.parametrize(("case", "happens"), CASES.items(), ids=lambda c: getattr(c, "__name__", ""))
def test_hermitage(case: Case, happens: bool) -> None:
    shard = Shard()
    assert case(shard) is happens, case.__doc__
    shard.core.check_integrity()


def test_a_better_version_shows_the_table_can_tell_writes_apart() -> None:
    shard = Shard()
    first(shard)
    assert seen(shard, X) == "INT8"
    shard.put([X], quality=LOSSLESS)
    assert seen(shard, X) == "LOSSLESS"
