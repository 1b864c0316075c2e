"""Promise: a tier with a codec holds lesser versions beside the better ones, and nobody who asked for better
ever sees them."""

from __future__ import annotations

import pytest

from kvstore.core.state import DemoteWhen
from kvstore.core.versions import ON_NVME
from kvstore.nouns import ChangeKind, MissReason, Refusal, Revision, Tier
from tests.kvstore.core.conftest import E1, E2, INT8, LOSSLESS, NAMESPACE, Shard, key
from tests.kvstore.core.test_moves import BOTH, SMALL, fill_host, made_small, tiered


def lossy(host: int = 4, **tiering: object) -> Shard:
    return tiered(host, encode=made_small, **tiering)  # type: ignore[arg-type]


def test_a_lesser_version_lands_beside_the_better_one() -> None:
    shard = lossy()
    (better,) = shard.put([0])
    assert shard.move() == 1
    assert shard.core.index.nvme.used_nbytes == SMALL
    for least in (LOSSLESS, INT8):
        assert shard.match([0], min_quality=least).versions[0].ref == better
    assert not shard.start()  # it is there: not made again
    shard.hits([0])
    assert not shard.start()


def test_the_lesser_version_is_seen_when_the_better_one_went_by_who_asked_for_so_little() -> None:
    shard = lossy()
    shard.put([0])
    shard.move()
    fill_host(shard, 4)
    assert shard.match([0]).miss is MissReason.LOW_QUALITY
    (seen,) = shard.match([0], min_quality=INT8).versions
    assert (seen.quality, seen.tier, seen.nbytes) == (INT8, Tier.NVME, SMALL)


def test_the_lesser_version_is_retired_by_a_better_one() -> None:
    shard = lossy()
    shard.put([0])
    shard.move()
    fill_host(shard, 4)
    held = shard.match([0], min_quality=INT8)
    (better,) = shard.put([0])
    assert shard.match([0], min_quality=INT8).versions[0].ref == better
    assert shard.residences(0, INT8) == 0
    for move in shard.start():  # of the lesser one, which the match wanted on the host
        assert shard.core.moves.done(move) == (move.source.quality is LOSSLESS)
    shard.core.check_integrity()
    shard.release(held.lease)
    shard.core.check_integrity()


def test_a_lesser_version_that_somebody_published_meanwhile_wins() -> None:
    shard = lossy()
    shard.put([0])
    (move,) = shard.start()
    row = move.source
    shard.core.report(row)
    assert shard.put([0], quality=INT8) == (Refusal.STAGED,)
    assert not shard.core.moves.done(move)
    (published,) = shard.put([0], quality=INT8)
    assert shard.match([0], min_quality=INT8).versions[0].ref == published


def test_what_is_lossy_already_goes_down_as_it_is_and_comes_up_as_it_is() -> None:
    shard = lossy()
    (ref,) = shard.put([0], quality=INT8)
    assert shard.move() == 1
    assert shard.residences(0, INT8) == BOTH
    fill_host(shard, 4)
    assert shard.match([0], min_quality=INT8).versions[0].ref == ref
    assert shard.move() == 1
    assert shard.residences(0, INT8) == BOTH


@pytest.mark.parametrize(
    "options", [{"exclusive": True}, {"when": DemoteWhen.CROWDED, "watermarks": (0.2, 0.0)}]
)
def test_the_better_one_leaves_where_a_tier_is_to_hold_no_copies(options: dict[str, object]) -> None:
    shard = lossy(**options)  # type: ignore[arg-type]
    shard.put([0])
    assert shard.move() == 1
    assert shard.residences(0) == 0
    assert shard.residences(0, INT8) == ON_NVME


def test_an_epoch_that_was_purged_takes_its_lesser_versions_along() -> None:
    shard = lossy()
    shard.put([0], E1)
    shard.put([0], E2)
    shard.move()
    shard.core.purge(NAMESPACE, None, 1)
    while shard.core.sweep(10):
        pass
    assert shard.tiers([0], E1, INT8) == [None]
    assert shard.tiers([0], E2, INT8) == [Tier.HOST]
    assert shard.core.index.nvme.used_nbytes == SMALL


def test_a_watcher_knows_on_which_tier_everything_lies() -> None:
    shard = lossy(exclusive=False)
    told: dict[tuple[bytes, int, int], int] = {}
    at = Revision(shard.core.config.incarnation, 0)

    def follow() -> None:
        nonlocal at
        at, changes = shard.core.past.changed_since(at, (NAMESPACE,), 1000)
        for change in changes:
            name = change.key, change.epoch, change.quality
            if change.kind in (ChangeKind.COMMITTED, ChangeKind.MOVED):
                assert (name in told) == (change.kind is ChangeKind.MOVED)
                told[name] = change.tier
            elif change.kind is ChangeKind.RETIRED:
                del told[name]
        _, listed, _ = shard.core.past.listing(NAMESPACE, None, 0, 1000)
        assert told == {(v.key, v.epoch.number, int(v.quality)): int(v.tier) for v in listed}

    shard.put([0])
    shard.put([100], quality=INT8)
    follow()
    shard.move()
    follow()
    fill_host(shard, 4)
    follow()
    assert set(told.values()) == {Tier.NVME}
    shard.match([0], min_quality=INT8)
    shard.match([100], min_quality=INT8)
    shard.move()
    follow()
    assert set(told.values()) == {Tier.HOST}
    shard.put([0])
    follow()
    shard.core.purge(NAMESPACE, (key(100),), None)
    follow()
