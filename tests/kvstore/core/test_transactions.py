"""Acknowledged means visible; what is not taken is named, and a writer that dies leaves nothing."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError, EpochUnknown, LeaseExpired, OverLimit
from kvstore.nouns import BlockRef, MissReason, NamespaceId, Refusal
from tests.kvstore.core.conftest import E1, E2, INT8, LOSSLESS, MODEL, NBYTES, Shard, epoch


def test_two_writers_of_one_key(shard: Shard) -> None:
    first, second = shard.begin([0, 1]), shard.begin([1, 2])
    assert (first.refusals, second.refusals) == ([None, None], [Refusal.STAGED, None])
    shard.write(first)
    shard.write(second)
    assert shard.hits([0]) == 0
    refs = shard.commit(first)
    assert shard.commit(second)[0] is Refusal.STAGED
    assert shard.hits([0, 1, 2]) == 3
    assert shard.put([1]) == refs[1:]  # it exists: the answer says where


def test_exists_means_same_epoch_and_at_least_that_quality(shard: Shard) -> None:
    shard.put([0], E1, INT8)
    assert shard.begin([0], E1, INT8).refusals == [Refusal.EXISTS]
    assert shard.begin([0], E1, LOSSLESS).refusals == [None]
    assert shard.begin([0], E2, INT8).refusals == [None]


def test_what_exists_is_held_until_the_writer_commits() -> None:
    shard = Shard(blocks=2)
    shard.put([0])
    txn = shard.begin([0])
    rival = shard.begin([100, 200])
    assert rival.refusals == [None, Refusal.NO_SPACE]
    shard.core.abort(rival.id)
    answer = shard.core.commit(txn.id, 5.0, shard.now)
    assert isinstance(shard.core.blocks(answer)[0], BlockRef)
    assert shard.begin([100, 200]).refusals == [None, Refusal.NO_SPACE]  # still held: by the reader's lease
    shard.later(6)
    shard.core.abort(shard.begin([300]).id)
    shard.later(6)
    assert shard.begin([100, 200]).refusals == [None, None]
    shard.core.check_integrity()


def test_what_existed_and_was_evicted_is_written_again() -> None:
    shard = Shard(blocks=1)
    shard.put([0])
    shard.put([100])
    assert shard.begin([0]).refusals == [None]


def test_the_first_commit_of_the_best_quality_wins(shard: Shard) -> None:
    lesser = shard.begin([0], quality=INT8)
    better = shard.begin([0], quality=LOSSLESS)
    shard.write(lesser)
    shard.write(better)
    (ref,) = shard.commit(better)
    assert shard.commit(lesser) == (ref,)  # a no-op: the block that stands is the better one
    assert shard.core.usage().live_nbytes == NBYTES


def test_a_commit_answers_every_offer_by_name(shard: Shard) -> None:
    shard.put([0])
    blocker = shard.begin([1])
    txn = shard.begin([0, 1, 2, 3, 4])
    shard.core.written(txn, 2, None, shard.now)
    shard.core.written(txn, 3, Refusal.CHECKSUM, shard.now)
    answer = shard.commit(txn)
    assert isinstance(answer[0], BlockRef)
    assert answer[1] is Refusal.STAGED
    assert isinstance(answer[2], BlockRef)
    assert answer[3:] == (Refusal.CHECKSUM, Refusal.UNWRITTEN)
    assert shard.core.counters["refusal:unwritten"] == 1
    shard.core.abort(blocker.id)


def test_a_lost_answer_can_be_asked_for_again(shard: Shard) -> None:
    txn = shard.begin([0], request=b"r")
    assert shard.begin([0], request=b"r") is txn
    shard.write(txn)
    answer = shard.core.commit(txn.id, 5.0, shard.now)
    assert shard.core.commit(txn.id, 5.0, shard.now) is answer
    assert shard.begin([0], request=b"r").id == txn.id
    shard.core.abort(txn.id)
    assert shard.hits([0]) == 1


def test_answers_are_forgotten_in_order_and_in_time() -> None:
    shard = Shard(answers_max=2)
    txns = [shard.begin([n], request=bytes([n])) for n in range(3)]
    for txn in txns:
        shard.commit(txn)
    with pytest.raises(LeaseExpired, match="begin another"):
        shard.commit(txns[0])
    assert shard.commit(txns[1]) == (Refusal.UNWRITTEN,)
    assert shard.begin([0], request=bytes([0])).id != txns[0].id
    shard.core.check_integrity()


def test_a_writer_that_dies_leaves_nothing(shard: Shard) -> None:
    shard.put([0])
    txn = shard.begin([0, 1, 2], lease_s=3.0)
    shard.core.written(txn, 1, None, shard.now)
    shard.later(4)
    usage = shard.core.usage()
    assert (usage.staged_nbytes, usage.live_nbytes, shard.core.leases) == (0, NBYTES, 0)
    assert shard.core.counters["expired:txn"] == 1
    with pytest.raises(LeaseExpired, match="begin another"):
        shard.commit(txn)
    assert shard.begin([1, 2]).refusals == [None, None]


def test_a_writer_at_work_does_not_expire(shard: Shard) -> None:
    txn = shard.begin(range(6), lease_s=3.0)
    for i in range(6):
        shard.later(2)
        shard.core.written(txn, i, None, shard.now)
    shard.commit(txn)
    assert shard.hits(range(6)) == 6


def test_an_epoch_that_is_not_registered_writes_nothing(shard: Shard) -> None:
    with pytest.raises(EpochUnknown, match="epoch 9"):
        shard.begin([0], epoch(9))
    assert shard.core.leases == 0


def test_a_block_found_corrupt_is_out_of_sight_at_once_and_can_be_written_again(shard: Shard) -> None:
    shard.put([0])
    then = shard.revision()
    held = shard.match([0])
    txn = shard.begin([0])
    shard.core.report(held.versions[0])
    assert shard.match([0]).miss is MissReason.ABSENT
    assert shard.match([0], at=then).miss is MissReason.COMPACTED
    assert shard.commit(txn) == (Refusal.CHECKSUM,)  # it existed at begin, and is nothing to rely on now
    assert shard.core.usage().retired_nbytes == NBYTES
    shard.put([0])
    assert shard.hits([0]) == 1
    shard.release(held.lease)
    assert shard.core.usage().retired_nbytes == 0


def test_bounds_are_refusals_and_errors_never_silence() -> None:
    shard = Shard(txns_max=1, offers_max=2, leases_max=3)
    with pytest.raises(OverLimit, match="at most 2"):
        shard.begin([0, 1, 2])
    assert shard.begin([0, 1], nbytes=9 * NBYTES).refusals == [Refusal.NO_SPACE, Refusal.NO_SPACE]
    with pytest.raises(OverLimit, match="txns_max"):
        shard.begin([0])
    shard.later(11)
    assert shard.begin([0], nbytes=0).refusals == [Refusal.MISMATCH]


def test_a_full_table_of_leases_does_not_stop_a_commit() -> None:
    shard = Shard(leases_max=1)
    txn = shard.begin([0])
    shard.write(txn)
    answer = shard.core.commit(txn.id, 5.0, shard.now)
    assert answer.lease is not None
    with pytest.raises(OverLimit, match="leases_max"):
        shard.begin([1])
    shard.core.check_integrity()


def test_what_was_not_granted_cannot_be_written(shard: Shard) -> None:
    shard.put([0])
    txn = shard.begin([0])
    for index in (0, 1, -1):
        with pytest.raises(ConfigError, match="was not granted"):
            shard.core.written(txn, index, None, shard.now)


def test_a_second_copy_that_arrives_broken_takes_nothing_from_the_first(shard: Shard) -> None:
    txn = shard.begin([0])
    shard.core.written(txn, 0, None, shard.now)
    shard.core.written(txn, 0, Refusal.CHECKSUM, shard.now)
    assert isinstance(shard.commit(txn)[0], BlockRef)


def test_every_change_takes_a_revision_and_nothing_else_does(shard: Shard) -> None:
    start = shard.core.revision
    shard.put([0, 1])
    assert shard.core.revision == start + 1
    shard.core.advance_epoch(MODEL, 2)
    shard.core.advance_epoch(MODEL, 2)
    assert shard.core.revision == start + 2
    shard.hits([0, 1])
    shard.begin([2])
    assert shard.core.revision == start + 2


def test_aborting_a_commit_whose_answer_was_lost_gives_its_pins_back(shard: Shard) -> None:
    txn = shard.begin([0, 1])
    shard.write(txn)
    shard.commit(txn, pin_for_s=600.0)
    assert shard.core.leases == 1
    shard.core.abort(txn.id)
    shard.core.abort(txn.id)
    assert (shard.core.leases, shard.hits([0, 1])) == (0, 2)
    shard.core.check_integrity()


def test_a_request_id_of_another_transaction_is_refused(shard: Shard) -> None:
    txn = shard.begin([0], request=b"mine")
    assert shard.begin([0], request=b"mine") is txn
    shard.open(NamespaceId(bytes([1]) * 16), MODEL)
    with pytest.raises(ConfigError, match="another transaction"):
        shard.begin([0], namespace=NamespaceId(bytes([1]) * 16), request=b"mine")
    with pytest.raises(ConfigError, match="another transaction"):
        shard.begin([0], E2, request=b"mine")
    with pytest.raises(ConfigError, match="another transaction"):
        shard.begin([0, 1], request=b"mine")
