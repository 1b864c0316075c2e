"""Promise 2: what a snapshot sees. The table is the worked example in `Version`'s comment, row by row."""

from __future__ import annotations

from itertools import permutations

import pytest

from kvstore.core.chain import Chain, State, Version, visible
from kvstore.nouns import BlockRef, Epoch, MissReason, Quality, Revision, ShardId, Snapshot, WeightsDigest
from tests.kvstore.core.conftest import E1, E2, E3, INCARNATION, INT8, LOSSLESS, MODEL, NAMESPACE, epoch, key

E4 = epoch(4)


def version(of: Epoch, quality: Quality, created: int, retired: int | None = None) -> Version:
    made = Version(
        NAMESPACE, key(1), key(0), 1, key(0), MODEL, of, quality,
        ref=BlockRef(ShardId("shard"), INCARNATION, created, 1), nbytes=1,
    )  # fmt: skip
    made.state = State.LIVE if retired is None else State.RETIRED
    made.created, made.retired = created, retired
    return made


A = version(E1, LOSSLESS, created=2, retired=8)
B = version(E2, INT8, created=5, retired=6)
C = version(E2, LOSSLESS, created=6)
D = version(E3, LOSSLESS, created=9)

BEFORE = Chain([A, B, C, D])
AFTER = Chain([C, D], horizon=8)  # the last pins of A and B are gone

LATEST = None
ROWS = [
    (BEFORE, E1, LOSSLESS, 0, LATEST, MissReason.OTHER_EPOCH),
    (BEFORE, E1, LOSSLESS, 0, 7, A),
    (BEFORE, E2, INT8, 0, LATEST, C),
    (BEFORE, E2, INT8, 0, 5, B),
    (BEFORE, E2, LOSSLESS, 0, 5, MissReason.LOW_QUALITY),
    (BEFORE, E3, LOSSLESS, 0, 8, MissReason.NOT_YET),
    (BEFORE, E3, LOSSLESS, 1, 8, C),
    (BEFORE, E4, LOSSLESS, 0, LATEST, MissReason.OTHER_EPOCH),
    (BEFORE, E2, LOSSLESS, 1, 7, C),
    (AFTER, E1, LOSSLESS, 0, 7, MissReason.COMPACTED),
    (AFTER, E2, INT8, 0, 5, MissReason.COMPACTED),
    (AFTER, E2, INT8, 0, 8, C),
    (Chain(), E1, LOSSLESS, 0, LATEST, MissReason.ABSENT),
]


@pytest.mark.parametrize(("chain", "of", "min_quality", "lag", "at", "sees"), ROWS)
def test_the_worked_example(
    chain: Chain, of: Epoch, min_quality: Quality, lag: int, at: int | None, sees: Version | MissReason
) -> None:
    revision = None if at is None else Revision(INCARNATION, at)
    snapshot = Snapshot(NAMESPACE, of, min_quality, lag, revision)
    for order in permutations(chain.versions):  # nothing depends on the order versions stand in
        assert visible(Chain(list(order), chain.horizon), snapshot) is sees


def test_equal_numbers_are_not_equal_weights() -> None:
    impostor = Epoch(E2.number, WeightsDigest(bytes(16)))
    assert visible(BEFORE, Snapshot(NAMESPACE, impostor, stale_lag_max=5)) is MissReason.OTHER_EPOCH


def test_what_is_staged_or_corrupt_is_seen_by_nobody() -> None:
    hidden = [version(E1, LOSSLESS, created=3), version(E1, LOSSLESS, created=3, retired=9)]
    hidden[0].state, hidden[1].state = State.STAGED, State.CORRUPT
    for revision in (None, Revision(INCARNATION, 5)):
        assert visible(Chain(hidden), Snapshot(NAMESPACE, E1, revision=revision)) is MissReason.ABSENT
