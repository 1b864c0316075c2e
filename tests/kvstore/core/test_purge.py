"""Promise: what was purged is gone from every later answer, and nothing written before it ever returns."""

from __future__ import annotations

import pytest

from kvstore.errors import NotFound, OverLimit
from kvstore.nouns import DROP, BlockRef, MissReason, NamespaceId, Refusal, allow_stale
from tests.kvstore.core.conftest import E1, E2, MODEL, NAMESPACE, NBYTES, Shard, key

OTHER = NamespaceId(bytes([1] * 16))


def drain(shard: Shard) -> None:
    while shard.core.sweep(3):
        pass


def test_a_purged_namespace_is_empty_at_once_and_its_bytes_follow() -> None:
    shard = Shard(20)
    shard.open(OTHER, "another model")
    shard.put([0, 1, 2])
    shard.put([5], namespace=OTHER)
    shard.core.purge(NAMESPACE, None, None)
    assert shard.match([0, 1, 2]).miss is MissReason.ABSENT
    assert shard.match([5], namespace=OTHER).miss is None
    assert len(shard.core.index) == 4  # nothing was walked yet
    drain(shard)
    assert [row.namespace for row in shard.core.index.rows()] == [OTHER]
    shard.core.check_integrity()


def test_what_is_written_after_a_purge_is_seen() -> None:
    shard = Shard()
    shard.put([0, 1])
    shard.core.purge(NAMESPACE, None, None)
    shard.put([0, 1])
    assert shard.hits([0, 1]) == 2
    drain(shard)
    assert shard.hits([0, 1]) == 2
    assert len(shard.core.index) == 2
    shard.core.check_integrity()


def test_only_one_epoch_of_a_namespace_is_purged() -> None:
    shard = Shard()
    shard.put([0], E1)
    shard.put([0], E2)
    shard.core.purge(NAMESPACE, None, 1)
    assert (shard.hits([0], E1), shard.hits([0], E2)) == (0, 1)
    shard.core.purge(NAMESPACE, None, 77)  # never registered: nothing of it is here
    assert shard.hits([0], E2) == 1


def test_purged_keys_go_with_all_their_versions() -> None:
    shard = Shard()
    shard.put([0, 1, 2], E1)
    shard.put([1], E2)
    assert shard.core.purge(NAMESPACE, (key(1), key(1), key(99)), None) == (2, 2 * NBYTES)
    assert (shard.hits([0, 1, 2]), shard.hits([2]), shard.hits([1], E2)) == (1, 1, 0)
    shard.put([1], E1)
    assert shard.core.purge(NAMESPACE, (key(1),), 2) == (0, 0)
    assert shard.hits([1]) == 1
    shard.core.check_integrity()


@pytest.mark.parametrize("keys", [None, (key(0),)])
def test_pinned_bytes_stay_for_who_pinned_them_and_go_with_the_pin(keys: tuple[bytes, ...] | None) -> None:
    shard = Shard()
    shard.put([0])
    held = shard.match([0])
    shard.core.purge(NAMESPACE, keys, None)  # type: ignore[arg-type]
    drain(shard)
    assert shard.match([0]).miss is MissReason.ABSENT
    assert not isinstance(shard.core.resolve(NAMESPACE, held.versions[0].ref), MissReason)
    shard.release(held.lease)
    assert shard.core.resolve(NAMESPACE, held.versions[0].ref) is MissReason.STALE_REFERENCE
    assert len(shard.core.index) == 0
    shard.core.check_integrity()


@pytest.mark.parametrize("keys", [None, (key(0),)])
@pytest.mark.parametrize("written", [False, True])
def test_what_was_being_written_when_it_was_purged_is_refused_by_name(
    keys: tuple[bytes, ...] | None, written: bool
) -> None:
    shard = Shard()
    txn = shard.begin([0])
    if written:
        shard.write(txn)
    shard.core.purge(NAMESPACE, keys, None)  # type: ignore[arg-type]
    if not written:
        shard.write(txn)
    again = shard.begin([0])
    assert again.refusals == [None]  # a new writer need not wait for one that can only fail
    assert shard.commit(txn) == (Refusal.PURGED,)
    shard.write(again)
    assert isinstance(shard.commit(again)[0], BlockRef)
    assert shard.hits([0]) == 1
    shard.core.check_integrity()


@pytest.mark.parametrize("keys", [None, (key(0),)])
def test_what_existed_at_begin_and_was_purged_since_is_not_answered(keys: tuple[bytes, ...] | None) -> None:
    shard = Shard()
    shard.put([0])
    txn = shard.begin([0])
    assert txn.refusals == [Refusal.EXISTS]
    shard.core.purge(NAMESPACE, keys, None)  # type: ignore[arg-type]
    assert shard.commit(txn, 5.0) == (Refusal.PURGED,)
    drain(shard)
    assert len(shard.core.index) == 0
    shard.core.check_integrity()


@pytest.mark.parametrize(("keys", "epoch"), [(None, None), (None, 2), ((key(0),), None), ((key(0),), 2)])
def test_a_fixed_revision_shows_nothing_else_in_place_of_what_was_purged(
    keys: tuple[bytes, ...] | None, epoch: int | None
) -> None:
    shard = Shard()
    shard.core.advance_epoch(MODEL, 2, allow_stale(1))
    shard.put([0], E1)
    shard.put([0], E2)
    then = shard.revision()
    assert shard.match([0], E2, lag=1, at=then).versions[0].epoch == E2
    shard.core.purge(NAMESPACE, keys, epoch)  # type: ignore[arg-type]
    assert shard.match([0], E2, lag=1, at=then).miss is MissReason.COMPACTED


def test_purges_are_bounded_and_say_what_is_wrong() -> None:
    shard = Shard(keys_max=2)
    with pytest.raises(OverLimit, match="at most 2"):
        shard.core.purge(NAMESPACE, (key(1), key(2), key(3)), None)
    with pytest.raises(NotFound, match="open it first"):
        shard.core.purge(OTHER, None, None)


def test_a_purge_gives_room_back_before_it_was_swept() -> None:
    shard = Shard(4)
    shard.put([0, 1, 2, 3])
    shard.core.purge(NAMESPACE, None, None)
    shard.put([100, 101, 102, 103])
    assert shard.hits([100, 101, 102, 103]) == 4
    drain(shard)
    assert shard.hits([100, 101, 102, 103]) == 4
    shard.core.check_integrity()


def test_a_dead_version_that_is_pinned_is_passed_over_for_the_one_behind_it() -> None:
    """Also where it heads its chain, by readers of stale KV."""
    shard = Shard()
    shard.core.advance_epoch(MODEL, 2, allow_stale(1))
    shard.put([0], E1)
    shard.put([0], E2)
    held = shard.match([0], E2)
    shard.core.purge(NAMESPACE, None, 2)
    assert [v.epoch for v in shard.match([0], E2, lag=1).versions] == [E1]
    assert shard.match([0], E2).miss in (MissReason.ABSENT, MissReason.OTHER_EPOCH)
    shard.release(held.lease)


def test_what_is_committed_into_an_epoch_that_was_dropped_meanwhile_is_refused() -> None:
    shard = Shard()
    txn = shard.begin([0, 1], E1)
    shard.write(txn)
    shard.core.advance_epoch(MODEL, 2, DROP)
    assert shard.commit(txn) == (Refusal.EPOCH, Refusal.EPOCH)
    assert shard.begin([0], E1).refusals == [Refusal.EPOCH]
    assert len(shard.core.index) == 0


def test_a_shard_that_grows_before_it_sweeps_leaves_nothing_behind(shard: Shard) -> None:
    """Found by tests/sim, seed 69: the sweep went round a circle that had grown meanwhile."""
    shard.put([0, 1])
    shard.core.purge(NAMESPACE, None, None)
    drain(shard)  # and stands where the next sweep begins
    shard.put([0, 1])
    shard.core.advance_epoch(MODEL, 2, DROP)
    shard.put([2, 3, 4], E2)
    drain(shard)
    assert [version.epoch for version in shard.core.index.rows()] == [E2, E2, E2]
