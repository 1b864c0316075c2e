"""A match's blocks are values when looked at, and cost nothing while they are only counted."""

from __future__ import annotations

from kvstore.nouns import BlockKey, BlockRef, Incarnation, PinnedBlock, Quality, ShardId, Tier
from kvstore.pinned_run import PinnedRun
from tests.kvstore.oracle import epoch

BLOCKS = [
    PinnedBlock(
        BlockKey(bytes([i]) * 32),
        BlockRef(ShardId("s"), Incarnation(1), i, 1),
        epoch(1),
        Quality.LOSSLESS,
        Tier.HOST,
    )
    for i in range(4)
]


def test_a_run_is_made_once_and_only_when_looked_at() -> None:
    made: list[int] = []

    def make() -> list[PinnedBlock]:
        made.append(1)
        return list(BLOCKS)

    run = PinnedRun(4, make)
    assert (len(run), bool(run), made) == (4, True, [])
    assert run[1] == BLOCKS[1]
    assert list(run) == BLOCKS
    assert made == [1]


def test_a_run_is_as_good_as_its_tuple() -> None:
    run, same, shorter = (PinnedRun(n, lambda n=n: BLOCKS[:n]) for n in (4, 4, 3))  # type: ignore[misc]
    assert run == tuple(BLOCKS)
    assert tuple(BLOCKS) == run
    assert run == same
    assert run != shorter
    assert hash(run) == hash(tuple(BLOCKS))
    assert run[1:3] == tuple(BLOCKS[1:3])
    assert PinnedRun(0, list) == ()
    assert BLOCKS[2] in run
    assert repr(run) == repr(tuple(BLOCKS))
