"""Version chains and the rule of visibility.

A chain holds every version of one key that is not reclaimed. Versions are never changed after their
commit, only retired. Looking one up is linear in the chain, which holds a handful.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from kvstore.nouns import BlockKey, BlockRef, Epoch, MissReason, NamespaceId, Quality, Snapshot, Tier


class State(enum.Enum):
    STAGED = "staged"  # being written by one transaction, invisible to all others
    LIVE = "live"  # committed
    RETIRED = "retired"  # no longer visible at latest; its bytes stay while it is pinned
    CORRUPT = "corrupt"  # retired because its bytes are not what was stored: no snapshot sees it


@dataclass(slots=True, eq=False)
class Version:
    """One (key, epoch, quality) on this shard.

    A chain of key K, at epochs 1 to 3, on one incarnation:

        revision 2: commit (e1, lossless)      A
        revision 5: commit (e2, int8)          B
        revision 6: commit (e2, lossless)      C   retires B, which a reader still pins
        revision 8: retire A                       A is pinned too
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

    When A's last pin goes, its bytes and A itself go, and the chain's horizon becomes 8:

        e1 lossless 0 @7      ->  -   COMPACTED    what stood there then is not known any more
        e2 int8     0 @5      ->  -   COMPACTED    better a miss than an answer that may have changed
        e2 int8     0 @8      ->  C                nothing that stood at 8 was reclaimed
    """

    namespace: NamespaceId
    key: BlockKey
    parent: BlockKey
    chain_index: int
    placement: BlockKey
    model_id: str
    epoch: Epoch
    quality: Quality
    ref: BlockRef
    nbytes: int
    tier: Tier = Tier.HOST
    state: State = State.STAGED
    created: int = 0  # revision counter of the commit
    retired: int | None = None
    written: bool = False  # the whole frame arrived and was verified
    pins: int = 0  # by how many leases it is held
    idle_since: int = 0  # count of the index's uses when it was last let go


@dataclass(slots=True, eq=False)
class Chain:
    """All versions of one key. Below `horizon` something was reclaimed: no snapshot is answered there."""

    versions: list[Version] = field(default_factory=list)
    horizon: int = 0


NO_CHAIN: Final = Chain()

# Why a version is not seen, by the number of tests it passed; the best of a chain's versions names the miss.
_MISSES: Final = (MissReason.ABSENT, MissReason.OTHER_EPOCH, MissReason.NOT_YET, MissReason.LOW_QUALITY)
_SEEN: Final = len(_MISSES)


def visible(chain: Chain, snapshot: Snapshot) -> Version | MissReason:
    """The version the snapshot sees, or why it sees none. The worked example stands at `Version`."""
    if snapshot.revision is not None and snapshot.revision.counter < chain.horizon:
        return MissReason.COMPACTED
    best: Version | None = None
    furthest = 0
    for version in chain.versions:
        passed = _tests_passed(version, snapshot)
        furthest = max(furthest, passed)
        if passed == _SEEN and (best is None or _rank(version) > _rank(best)):
            best = version
    return _MISSES[furthest] if best is None else best


def can_see(snapshot: Snapshot, epoch: Epoch) -> bool:
    """Does the snapshot accept KV of this epoch? Equal numbers must be equal weights."""
    lag = snapshot.epoch.number - epoch.number
    if lag == 0:
        return epoch.weights_digest == snapshot.epoch.weights_digest
    return 0 < lag <= snapshot.stale_lag_max


def _rank(version: Version) -> tuple[int, Quality]:
    return version.epoch.number, version.quality


def _tests_passed(version: Version, snapshot: Snapshot) -> int:
    at = snapshot.revision
    if version.state is not State.LIVE and (at is None or version.state is not State.RETIRED):
        return 0
    if not can_see(snapshot, version.epoch):
        return 1
    if at is not None and not _stands_at(version, at.counter):
        return 2
    return 3 if version.quality < snapshot.min_quality else _SEEN


def _stands_at(version: Version, counter: int) -> bool:
    return version.created <= counter and (version.retired is None or version.retired > counter)
