"""Promise: a tenant holds no more than its quota, pushes out nobody else, and is told what was refused."""

from __future__ import annotations

from kvstore.nouns import NamespaceId, Refusal
from tests.kvstore.core.conftest import MODEL, NBYTES, Shard

OURS, THEIRS = NamespaceId(bytes([1] * 16)), NamespaceId(bytes([2] * 16))


def two_tenants(blocks: int = 10, quota: int = 3) -> Shard:
    shard = Shard(blocks, quotas={"us": quota * NBYTES})
    shard.open(OURS, MODEL, "us")
    shard.open(THEIRS, MODEL, "them")
    return shard


def ours(shard: Shard) -> int:
    return shard.core.index.accounts["us"].used_nbytes // NBYTES


def test_an_over_quota_write_makes_room_among_its_own() -> None:
    shard = two_tenants()
    shard.put([0, 1, 2], namespace=THEIRS)
    for n in (0, 100, 200, 300, 400):
        shard.put([n], namespace=OURS)
    assert ours(shard) == 3
    assert len(shard.match([0, 1, 2], namespace=THEIRS).versions) == 3
    assert [len(shard.match([n], namespace=OURS).versions) for n in (0, 100, 200, 300, 400)] == [
        0,
        0,
        1,
        1,
        1,
    ]
    shard.core.check_integrity()


def test_what_is_pinned_or_being_written_counts_and_the_rest_is_refused_by_name() -> None:
    shard = two_tenants()
    shard.put([0, 1], namespace=OURS)
    held = shard.match([0, 1], namespace=OURS)
    txn = shard.begin([100, 101], namespace=OURS)
    assert txn.refusals == [None, Refusal.QUOTA]
    shard.write(txn)
    assert shard.commit(txn)[1] is Refusal.QUOTA
    assert shard.core.counters["refusal:quota"] == 1
    assert len(shard.match([100], namespace=OURS).versions) == 1
    shard.release(held.lease)
    shard.core.check_integrity()


def test_a_full_shard_is_no_reason_to_push_out_another_tenant_beyond_need() -> None:
    """Without a quota of its own a tenant takes what is idle, whoever's it is: LRU over all."""
    shard = two_tenants(blocks=4, quota=2)
    shard.put([0, 1], namespace=OURS)
    shard.put([0, 1, 2, 3], namespace=THEIRS)
    assert ours(shard) == 0
    shard.put([5], namespace=OURS)
    assert ours(shard) == 1
    shard.core.check_integrity()


def test_a_quota_smaller_than_a_block_refuses_every_block() -> None:
    shard = two_tenants(quota=0)
    assert shard.begin([0], namespace=OURS).refusals == [Refusal.QUOTA]
    shard.core.check_integrity()
