"""Version chains and the rule of visibility.

A chain holds every version of one key that is not reclaimed: the newest epoch first, of one epoch the best
quality first. Versions are never changed after their commit, only retired. Looking one up is linear in the
chain, which holds a handful.

A chain of key K, at epochs 1 to 3, on one incarnation of a model that allows stale reads:

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

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from kvstore.core.epochs import EpochTable
from kvstore.core.spaces import Space
from kvstore.core.versions import NONE, State, Versions
from kvstore.nouns import BlockKey, MissReason, Snapshot

LATEST: Final = (1 << 64) - 1
"""The revision of a snapshot that is not fixed."""

# Why a version is not seen, by the number of tests it passed; the best of a chain's versions names the miss.
_MISSES: Final = (MissReason.ABSENT, MissReason.OTHER_EPOCH, MissReason.NOT_YET, MissReason.LOW_QUALITY)
_LIVE: Final = int(State.LIVE)


class View(NamedTuple):
    """A snapshot in the table's own terms."""

    epoch_id: int  # UNBOUND: nothing of its own epoch is seen
    number: int
    oldest: int  # number of the oldest epoch it may see
    min_quality: int
    at: int  # revision counter, or LATEST


def view_of(snapshot: Snapshot, model_id: str, epochs: EpochTable) -> View | MissReason:
    """Effective lag is the lesser of what the model allows and what the snapshot asks."""
    model, number = epochs.of(model_id), snapshot.epoch.number
    if number < model.oldest:
        return MissReason.DROPPED_EPOCH
    if snapshot.revision is not None and snapshot.stale_lag_max and snapshot.revision.counter < model.changed:
        return MissReason.COMPACTED  # another lag was allowed then: it could gain
    lag = min(model.stale_lag_max, snapshot.stale_lag_max)
    oldest = max(model.oldest, number - lag)
    at = LATEST if snapshot.revision is None else snapshot.revision.counter
    return View(epochs.id_of(model_id, snapshot.epoch), number, oldest, int(snapshot.min_quality), at)


def run_of(
    keys: Sequence[BlockKey], view: View, space: Space, versions: Versions, epochs: EpochTable
) -> tuple[list[int], MissReason | None]:
    """Slots of the longest prefix of `keys` the view sees, and why it ended.

    The hot loop of every match: nearly always the chain's first version is of the view's own epoch.
    """
    run: list[int] = []
    if view.at != LATEST:
        return _run_at(keys, view, space, versions, epochs)
    heads, own, least, floor = space.heads, view.epoch_id, view.min_quality, space.floor(view.epoch_id)
    epoch_ids, states, qualities, created = (
        versions.epochs,
        versions.states,
        versions.qualities,
        versions.created,
    )
    for key in keys:
        slot = heads.get(key, NONE)
        if slot == NONE:
            return run, MissReason.ABSENT
        first = epoch_ids[slot] == own and states[slot] == _LIVE
        if not (first and qualities[slot] >= least and created[slot] > floor):
            seen = see(slot, view, space, versions, epochs)
            if isinstance(seen, MissReason):
                return run, seen
            slot = seen
        run.append(slot)
    return run, None


def see(head: int, view: View, space: Space, versions: Versions, epochs: EpochTable) -> int | MissReason:
    """The slot of the version the view sees in the chain that begins at `head`, or why it sees none."""
    furthest, slot = 0, head
    while slot != NONE:
        passed = _tests_passed(slot, view, space, versions, epochs)
        if passed == len(_MISSES):
            return slot  # the chain's order makes the first one the best
        furthest = max(furthest, passed)
        slot = versions.next[slot]
    return _MISSES[furthest]


def _run_at(
    keys: Sequence[BlockKey], view: View, space: Space, versions: Versions, epochs: EpochTable
) -> tuple[list[int], MissReason | None]:
    run: list[int] = []
    if view.at < space.purged_last:
        return run, MissReason.COMPACTED if keys else None
    for key in keys:
        if view.at < space.horizons.get(key, 0):
            return run, MissReason.COMPACTED
        seen = see(space.heads.get(key, NONE), view, space, versions, epochs)
        if isinstance(seen, MissReason):
            return run, seen
        run.append(seen)
    return run, None


def _tests_passed(slot: int, view: View, space: Space, versions: Versions, epochs: EpochTable) -> int:
    state, epoch_id = versions.states[slot], versions.epochs[slot]
    if state != _LIVE and (view.at == LATEST or state != State.RETIRED):
        return 0
    if versions.created[slot] <= space.floor(epoch_id):
        return 0
    if epoch_id != view.epoch_id and not view.oldest <= epochs.bound[epoch_id].epoch.number < view.number:
        return 1
    if view.at != LATEST and not versions.stands_at(slot, view.at):
        return 2
    return 3 if versions.qualities[slot] < view.min_quality else 4
