"""Version chains and the rule of visibility.

A chain holds every version of one key that is not reclaimed. Versions are never changed after their
commit, only retired. Looking one up is linear in the chain, which holds a handful.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvstore.nouns import BlockKey, Epoch, LeaseId, MissReason, Quality, Snapshot, Tier


class State(enum.Enum):
    STAGED = "staged"  # being written by one transaction, invisible to all others
    LIVE = "live"  # committed
    RETIRED = "retired"  # no longer visible at latest; its bytes stay while it is pinned


@dataclass(slots=True, eq=False)
class Version:
    """One (key, epoch, quality) on this shard.

    A chain of key K, at epochs 1 to 3, on one incarnation:

        revision 2: commit (e1, lossless)      A
        revision 5: commit (e2, int8)          B
        revision 6: commit (e2, lossless)      C
        revision 8: retire A
        revision 9: commit (e3, lossless)      D

    What snapshots see (epoch, min_quality, stale_lag_max, revision):

        e1 lossless 0 latest  ->  -   OTHER_EPOCH  A is retired: only later epochs stand
        e1 lossless 0 @7      ->  A                retired after revision 7
        e2 int8     0 latest  ->  C                newest epoch first, then best quality
        e2 int8     0 @5      ->  B                C was created after
        e2 lossless 0 @5      ->  -   LOW_QUALITY  only B is there, and it is int8
        e3 lossless 0 @8      ->  -   NOT_YET      D was created after
        e3 lossless 1 @8      ->  C                one epoch of lag allowed
        e4 lossless 0 latest  ->  -   OTHER_EPOCH  nothing of epoch 4
        e2 lossless 1 @7      ->  C                own epoch wins over the older A
    """

    key: BlockKey
    parent: BlockKey
    chain_index: int
    placement: BlockKey
    model_id: str
    epoch: Epoch
    quality: Quality
    slot: int
    generation: int
    nbytes: int
    tier: Tier = Tier.HOST
    state: State = State.STAGED
    created: int = 0  # revision counter of the commit
    retired: int | None = None
    written: bool = False  # the whole frame arrived and was verified
    pins: set[LeaseId] = field(default_factory=set)


def can_see(snapshot: Snapshot, epoch: Epoch) -> bool:
    """Does the snapshot accept KV of this epoch? Equal numbers must be equal weights."""
    lag = snapshot.epoch.number - epoch.number
    if lag == 0:
        return epoch.weights_digest == snapshot.epoch.weights_digest
    return 0 < lag <= snapshot.stale_lag_max


def visible(chain: list[Version], snapshot: Snapshot) -> Version | MissReason:
    """The version the snapshot sees, or why it sees none. The worked example stands at `Version`."""
    latest = snapshot.revision is None
    there = [v for v in chain if v.state is State.LIVE or (v.state is State.RETIRED and not latest)]
    of_epoch = [v for v in there if can_see(snapshot, v.epoch)]
    if not of_epoch:
        return MissReason.OTHER_EPOCH if there else MissReason.ABSENT
    in_time = [v for v in of_epoch if _stands_at(v, snapshot)]
    if not in_time:
        return MissReason.NOT_YET
    good = [v for v in in_time if v.quality >= snapshot.min_quality]
    if not good:
        return MissReason.LOW_QUALITY
    return max(good, key=lambda v: (v.epoch.number, v.quality))


def _stands_at(version: Version, snapshot: Snapshot) -> bool:
    if snapshot.revision is None:
        return True
    at = snapshot.revision.counter
    return version.created <= at and (version.retired is None or version.retired > at)
