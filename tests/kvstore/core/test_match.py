"""Match-and-pin: the longest run, held from the same step on, and the reason it ended."""

from __future__ import annotations

import pytest

from kvstore.core.ids import Ids
from kvstore.core.versions import State
from kvstore.errors import NotFound, OverLimit
from kvstore.nouns import Incarnation, MissReason, NamespaceId, Refusal, Revision
from tests.kvstore.core.conftest import E1, E2, INCARNATION, INT8, LOSSLESS, MODEL, NAMESPACE, NBYTES, Shard

OTHER = NamespaceId(bytes([1] * 16))


def test_the_longest_run_and_why_it_ended(shard: Shard) -> None:
    shard.put([0, 1, 3])
    shard.put([2], quality=INT8)
    matched = shard.match([0, 1, 2, 3])
    assert [v.chain_index for v in matched.versions] == [0, 1]
    assert matched.miss is MissReason.LOW_QUALITY
    assert len(shard.match([0, 1, 2, 3], min_quality=INT8).versions) == 4
    assert shard.match([4]).lease is None
    assert (shard.core.counters["miss:low_quality"], shard.core.counters["miss:absent"]) == (1, 1)


def test_a_match_pins_in_the_same_step(shard: Shard) -> None:
    shard.put(range(8))
    matched = shard.match(range(8))
    assert shard.begin([100]).refusals == [Refusal.NO_SPACE]
    shard.release(matched.lease)
    assert shard.begin([100]).refusals == [None]


def test_kv_of_one_epoch_is_never_matched_by_another(shard: Shard) -> None:
    shard.put([0], E1)
    assert shard.match([0], E2).miss is MissReason.OTHER_EPOCH
    shard.core.advance_epoch(MODEL, 2)
    assert shard.hits([0], E1) == 1  # readers of the old weights keep what they had
    shard.put([0], E2)
    assert [v.epoch for v in shard.match([0], E2).versions] == [E2]
    assert [v.epoch for v in shard.match([0], E1).versions] == [E1]


def test_no_key_crosses_a_namespace(shard: Shard) -> None:
    """A stranger who knows a key neither reads it, nor learns of it, nor stops its owner from writing it."""
    shard.open(OTHER, "other model")
    shard.put([0, 1])
    assert shard.match([0], namespace=OTHER).miss is MissReason.ABSENT
    assert shard.begin([0], namespace=OTHER).refusals == [None]
    shard.put([2], namespace=OTHER)
    assert shard.hits([0, 1, 2]) == 2
    assert shard.begin([2]).refusals == [None]


def test_a_revision_of_another_life_is_compacted_and_of_the_future_not_yet(shard: Shard) -> None:
    shard.put([0])
    now = shard.revision()
    assert len(shard.match([0], at=now).versions) == 1
    assert shard.match([0], at=Revision(Incarnation(6), now.counter)).miss is MissReason.COMPACTED
    assert shard.match([0], at=Revision(now.incarnation, now.counter + 1)).miss is MissReason.NOT_YET


def test_a_snapshot_never_falls_back_to_a_lesser_version(shard: Shard) -> None:
    """What stood at a revision is answered or missed; a lesser block in its place would be a change."""
    shard.put([0], quality=INT8)
    reader = shard.match([0], min_quality=INT8)  # keeps the int8 bytes past their retirement
    before = shard.revision()
    shard.put([0], quality=LOSSLESS)
    after = shard.revision()
    assert [v.quality for v in shard.match([0], min_quality=INT8, at=before).versions] == [INT8]
    assert [v.quality for v in shard.match([0], min_quality=INT8, at=after).versions] == [LOSSLESS]
    shard.later(11)  # the int8 bytes go with their last pin
    assert shard.core.usage().retired_nbytes == 0
    assert reader.versions[0].retired is not None
    assert shard.match([0], min_quality=INT8, at=before).miss is MissReason.COMPACTED
    assert len(shard.match([0], min_quality=INT8, at=after).versions) == 1


def test_a_retired_version_keeps_its_bytes_while_it_is_pinned(shard: Shard) -> None:
    shard.put([0], quality=INT8)
    held = shard.match([0], min_quality=INT8)
    shard.put([0], quality=LOSSLESS)
    assert shard.core.usage().retired_nbytes == NBYTES
    assert shard.core.resolve(NAMESPACE, held.versions[0].ref) == held.versions[0]._replace(
        state=State.RETIRED, retired=2
    )
    shard.release(held.lease)
    assert shard.core.usage().retired_nbytes == 0
    assert shard.core.resolve(NAMESPACE, held.versions[0].ref) is MissReason.STALE_REFERENCE


def test_unknown_namespaces_and_long_matches_are_errors_that_say_what_to_do() -> None:
    shard = Shard(keys_max=2)
    with pytest.raises(NotFound, match="open it first"):
        shard.match([0], namespace=OTHER)
    with pytest.raises(OverLimit, match="at most 2"):
        shard.match([0, 1, 2])


def test_a_lease_of_an_earlier_life_names_nobody(shard: Shard) -> None:
    shard.put([0])
    lease = shard.match([0]).lease
    assert lease is not None
    later = Ids(Incarnation(INCARNATION + 1), b"")
    assert lease not in {later.next() for _ in range(1000)}
    shard.release(type(lease)(lease & 0xFFFFFFFF))
    assert shard.core.renew(lease, 5.0, shard.now)
