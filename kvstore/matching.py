"""A match over shards: keys to their owners at once, the answers' prefix run, and the leases of shards that
add nothing to it given back.

With one shard there is nothing to place and no task to make: this is most of a match's way in Python, and a
match is asked for before every prompt (benchmarks/latency.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from kvstore.answers import Match
from kvstore.deadline import Deadline
from kvstore.hashing import placement_keys
from kvstore.nouns import OFFERS_MAX, BlockKey, LeaseId, MissReason, PinnedBlock, ShardId
from kvstore.pinned_run import PinnedRun
from kvstore.placement import owner as owner_of
from kvstore.transport.base import MatchResult

Answer = MatchResult | MissReason
Ask = Callable[[ShardId, Sequence[BlockKey], Deadline], Awaitable[Answer]]
"""A shard's own match; raises nothing that the shard is to blame for."""
GiveBack = Callable[[ShardId, LeaseId], None]


async def match_over(
    weights: Mapping[ShardId, float],
    keys: Sequence[BlockKey],
    deadline: Deadline,
    ask: Ask,
    give_back: GiveBack,
) -> Match:
    """The longest prefix run of `keys` over all shards, pinned."""
    if len(weights) == 1 and keys:
        (shard,) = weights
        return _alone(shard, keys, await ask(shard, keys, deadline))
    placed = place(placement_keys(keys), weights)
    if not placed:
        return Match((), (), MissReason.SHARD_UNAVAILABLE if keys else None)
    answers: dict[ShardId, Answer] = dict.fromkeys(placed, MissReason.SHARD_UNAVAILABLE)

    async def match_on(shard: ShardId, mine: list[int]) -> None:
        answers[shard] = await ask(shard, [keys[i] for i in mine], deadline)

    try:
        await all_of(match_on(*part) for part in placed.items())
    except BaseException:
        for shard, lease in _leases_of(answers):
            give_back(shard, lease)
        raise
    return _joined(keys, placed, answers, give_back)


def place(placements: Sequence[BlockKey], weights: Mapping[ShardId, float]) -> dict[ShardId, list[int]]:
    """Positions by the shard that owns them. Empty when there is no shard at all."""
    placed: dict[ShardId, list[int]] = {}
    if not weights:
        return placed
    owners = {placement: owner_of(placement, weights) for placement in set(placements)}
    for i, placement in enumerate(placements):
        placed.setdefault(owners[placement], []).append(i)
    return placed


def parts_of(placed: Mapping[ShardId, list[int]]) -> list[tuple[ShardId, list[int]]]:
    """What was placed, in the parts that one transaction each can take."""
    return [
        (shard, mine[start : start + OFFERS_MAX])
        for shard, mine in placed.items()
        for start in range(0, len(mine), OFFERS_MAX)
    ]


async def all_of(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All calls, each to its end: when this raises, none goes on behind the caller's back."""
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _alone(shard: ShardId, keys: Sequence[BlockKey], answer: Answer) -> Match:
    if isinstance(answer, MissReason):
        return Match((), (), answer)
    blocks = PinnedRun(len(answer), lambda: answer.pinned(shard, keys))
    miss = (answer.miss or MissReason.ABSENT) if len(blocks) < len(keys) else None
    return Match(blocks, () if answer.lease is None else ((shard, answer.lease),), miss)


def _joined(
    keys: Sequence[BlockKey],
    placed: Mapping[ShardId, list[int]],
    answers: Mapping[ShardId, Answer],
    give_back: GiveBack,
) -> Match:
    found: list[PinnedBlock | None] = [None] * len(keys)
    for shard, mine in placed.items():
        if isinstance(answer := answers[shard], MatchResult):
            for i, block in zip(mine, answer.pinned(shard, [keys[i] for i in mine]), strict=False):
                found[i] = block
    run = next((i for i, block in enumerate(found) if block is None), len(found))
    blocks = tuple(block for block in found[:run] if block is not None)
    used = {block.ref.shard for block in blocks}
    leases = _leases_of(answers)
    for shard, lease in leases:
        if shard not in used:
            give_back(shard, lease)
    miss = None
    if run < len(keys):
        stopped = answers[next(shard for shard, mine in placed.items() if run in mine)]
        miss = stopped if isinstance(stopped, MissReason) else stopped.miss or MissReason.ABSENT
    return Match(blocks, tuple(lease for lease in leases if lease[0] in used), miss)


def _leases_of(answers: Mapping[ShardId, Answer]) -> list[tuple[ShardId, LeaseId]]:
    return [
        (shard, answer.lease)
        for shard, answer in answers.items()
        if isinstance(answer, MatchResult) and answer.lease is not None
    ]
