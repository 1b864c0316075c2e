"""Promise 2: what a snapshot sees. The table is the worked example of `core/chain.py`, lived through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.core.versions import State
from kvstore.nouns import (
    DROP,
    ISOLATE,
    BlockRef,
    Epoch,
    LeaseId,
    MissReason,
    Quality,
    Revision,
    WeightsDigest,
    allow_stale,
)
from tests.kvstore.core.conftest import E1, E2, E3, INCARNATION, INT8, LOSSLESS, MODEL, Shard, epoch

E4 = epoch(4)
K = 1
LATEST = None
BEFORE = [
    (E1, LOSSLESS, 0, LATEST, MissReason.OTHER_EPOCH),
    (E1, LOSSLESS, 0, 7, "A"),
    (E2, INT8, 0, LATEST, "C"),
    (E2, INT8, 0, 5, "B"),
    (E2, LOSSLESS, 0, 5, MissReason.LOW_QUALITY),
    (E3, LOSSLESS, 0, 8, MissReason.NOT_YET),
    (E3, LOSSLESS, 1, 8, "C"),
    (E4, LOSSLESS, 0, LATEST, MissReason.OTHER_EPOCH),
    (E2, LOSSLESS, 1, 7, "C"),
]
AFTER = [
    (E1, LOSSLESS, 0, 7, MissReason.COMPACTED),
    (E2, INT8, 0, 5, MissReason.COMPACTED),
    (E2, INT8, 0, 8, "C"),
]


class Story:
    """The worked example, revision by revision."""

    def __init__(self) -> None:
        self.shard = Shard(16)
        self.names: dict[BlockRef, str] = {}
        shard = self.shard
        shard.core.advance_epoch(MODEL, 1, allow_stale(1))
        self.commit("A", E1, LOSSLESS)
        pin_a = shard.match([K])
        shard.put([50])
        shard.put([51])
        self.commit("B", E2, INT8)
        pin_b = shard.match([K], E2, min_quality=INT8)
        self.commit("C", E2, LOSSLESS)
        shard.put([52])
        shard.core.index.retire(pin_a.versions[0].ref.slot, shard.core.changes.advance())
        self.commit("D", E3, LOSSLESS)
        self.pins: list[LeaseId | None] = [pin_a.lease, pin_b.lease]

    def commit(self, name: str, of: Epoch, quality: Quality) -> None:
        (block,) = self.shard.put([K], of, quality)
        assert isinstance(block, BlockRef)
        self.names[block] = name

    def sees(self, of: Epoch, min_quality: Quality, lag: int, at: int | None) -> str | MissReason | None:
        revision = None if at is None else Revision(INCARNATION, at)
        found = self.shard.match([K], of, min_quality=min_quality, lag=lag, at=revision)
        self.shard.release(found.lease)
        return self.names[found.versions[0].ref] if found.versions else found.miss


@pytest.fixture
def story() -> Iterator[Story]:
    made = Story()
    assert [made.shard.core.index.at(r.slot, r.generation).created for r in made.names] == [2, 5, 6, 9]  # type: ignore[union-attr]
    yield made
    made.shard.core.check_integrity()


@pytest.mark.parametrize(("of", "min_quality", "lag", "at", "sees"), BEFORE)
def test_the_worked_example(
    story: Story, of: Epoch, min_quality: Quality, lag: int, at: int | None, sees: str | MissReason
) -> None:
    assert story.sees(of, min_quality, lag, at) == sees


@pytest.mark.parametrize(("of", "min_quality", "lag", "at", "sees"), AFTER)
def test_the_worked_example_when_the_last_pins_are_gone(
    story: Story, of: Epoch, min_quality: Quality, lag: int, at: int | None, sees: str | MissReason
) -> None:
    story.shard.release(*story.pins)
    assert story.sees(of, min_quality, lag, at) == sees


def test_equal_numbers_are_not_equal_weights(story: Story) -> None:
    impostor = Epoch(E2.number, WeightsDigest(bytes(16)))
    story.shard.put([60], E2)
    assert story.shard.match([60], impostor, lag=5).miss is MissReason.OTHER_EPOCH


def test_a_key_nobody_wrote_is_absent(story: Story) -> None:
    assert story.shard.match([99]).miss is MissReason.ABSENT


@pytest.mark.parametrize("at", [None, 2])
def test_what_is_staged_or_corrupt_is_seen_by_nobody(at: int | None) -> None:
    shard = Shard()
    shard.begin([2])
    shard.put([K])
    shard.put([5])
    held = shard.match([K])
    shard.core.report(held.versions[0])
    assert shard.core.index.row(held.versions[0].ref.slot).state is State.GONE
    revision = None if at is None else Revision(INCARNATION, at)
    assert shard.match([2], at=revision).miss is MissReason.ABSENT
    assert shard.match([K], at=revision).miss in (MissReason.ABSENT, MissReason.COMPACTED)


@pytest.mark.parametrize(
    ("allowed", "asked", "sees"),
    [(0, 0, 0), (0, 5, 0), (1, 0, 0), (1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1)],
)
def test_the_lag_is_the_lesser_of_what_the_model_allows_and_the_snapshot_asks(
    allowed: int, asked: int, sees: int
) -> None:
    """Versions of epochs 1 and 2 stand; a reader at 3 sees the newest one within the effective lag."""
    shard = Shard()
    shard.core.advance_epoch(MODEL, 3, allow_stale(allowed))
    shard.put([K], E1)
    if sees != 1:
        shard.put([K], E2)
    found = shard.match([K], E3, lag=asked)
    assert [version.epoch.number for version in found.versions] == ([sees] if sees else [])


def test_a_fixed_revision_gains_nothing_from_a_policy_that_came_later() -> None:
    shard = Shard()
    shard.put([K], E1)
    then = shard.revision()
    assert shard.match([K], E2, lag=1, at=then).miss is MissReason.OTHER_EPOCH
    shard.core.advance_epoch(MODEL, 2, allow_stale(1))
    assert shard.match([K], E2, lag=1, at=then).miss is MissReason.COMPACTED
    assert shard.match([K], E2, lag=1).miss is None


def test_dropped_epochs_are_refused_and_their_pins_honoured() -> None:
    shard = Shard()
    shard.put([K, 2], E1)
    held = shard.match([K], E1)
    shard.core.advance_epoch(MODEL, 2, DROP)
    assert shard.match([K], E1).miss is MissReason.DROPPED_EPOCH
    assert shard.match([K], E2, lag=5).miss is MissReason.OTHER_EPOCH
    assert shard.core.sweep(100) == 0
    left = list(shard.core.index.rows())
    assert [v.key for v in left] == [held.versions[0].key]  # the other one was swept away
    shard.release(held.lease)
    assert len(shard.core.index) == 0
    shard.core.check_integrity()


def test_what_was_dropped_stays_dropped() -> None:
    shard = Shard()
    shard.core.advance_epoch(MODEL, 2, DROP)
    shard.core.advance_epoch(MODEL, 3, ISOLATE)
    assert shard.match([K], E1).miss is MissReason.DROPPED_EPOCH
    shard.core.advance_epoch(MODEL, 3, allow_stale(2))
    shard.put([K], E2)
    assert shard.match([K], E3, lag=2).miss is None
