"""Prefetch as a client asks for it: announced to every shard at once, one answer put together from theirs.

A shard that does not answer, or is too old to know the call, has nothing announced: it is named, never an
error. Cost: one round trip, and what the caller chooses to wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvstore.hashing import placement_keys
from kvstore.matching import all_of, place
from kvstore.nouns import BlockKey, ShardId, Tier
from kvstore.transport.base import Announced

PrefetchMode = Literal["best_effort", "timeout", "wait_complete"]

ANSWER_S: Final = 0.5  # of a call's time, a quarter of it at most: kept for the shards' answers


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """What the store has of a prompt, and what of it is on its way to the shards' host memory."""

    n_tokens: int  # of the run of blocks that is there, wherever it lies
    blocks: int
    on_host: int  # of these blocks
    coming: int  # over all shards: also of blocks behind a gap
    coming_nbytes: int
    promotion_nbytes_s: float  # as the slowest shard that brings some up measured lately; 0: not measured
    unanswered: tuple[ShardId, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Does all of it lie on hosts?"""
        return self.on_host == self.blocks


Ask = Callable[[ShardId, Sequence[BlockKey]], Awaitable[Announced | None]]
"""A shard's own answer; None where there is none. Raises nothing that the shard is to blame for."""


async def announce_over(
    weights: Mapping[ShardId, float], keys: Sequence[BlockKey], block_tokens: int, ask: Ask
) -> PrefetchResult:
    """Every shard is told of its keys at once."""
    placed = place(placement_keys(keys), weights)
    answers: dict[ShardId, Announced | None] = dict.fromkeys(placed)

    async def announce_on(shard: ShardId, mine: list[int]) -> None:
        answers[shard] = await ask(shard, [keys[i] for i in mine])

    await all_of(announce_on(*part) for part in placed.items())
    return joined(len(keys), block_tokens, placed, answers)


def wait_of(mode: PrefetchMode, wait_s: float, timeout_s: float) -> float:
    """How long the shards may wait before they answer. Raises ValueError."""
    complete_s = timeout_s - min(ANSWER_S, timeout_s / 4)
    if mode == "best_effort":
        return 0.0
    if mode == "wait_complete":
        return complete_s
    if mode != "timeout":
        raise ValueError(f"mode is {mode!r}: best_effort, timeout or wait_complete, please")
    if not 0 < wait_s < float("inf"):
        raise ValueError(f"wait_s is {wait_s}: how many seconds may mode='timeout' wait?")
    return min(wait_s, complete_s)


def joined(
    asked: int,
    block_tokens: int,
    placed: Mapping[ShardId, Sequence[int]],
    answers: Mapping[ShardId, Announced | None],
) -> PrefetchResult:
    """The shards' answers as one. `placed` has the places of the keys each was asked for, in order."""
    tiers = [0] * asked
    for shard, mine in placed.items():
        if (answer := answers[shard]) is not None:
            for i, tier in zip(mine, answer.tiers, strict=False):
                tiers[i] = tier
    blocks = next((i for i, tier in enumerate(tiers) if not tier), asked)
    told = [answer for answer in answers.values() if answer is not None]
    rates = [answer.promotion_nbytes_s for answer in told if answer.coming]
    return PrefetchResult(
        n_tokens=blocks * block_tokens,
        blocks=blocks,
        on_host=tiers[:blocks].count(Tier.HOST),
        coming=sum(answer.coming for answer in told),
        coming_nbytes=sum(answer.coming_nbytes for answer in told),
        promotion_nbytes_s=min(rates, default=0.0),
        unanswered=tuple(shard for shard, answer in answers.items() if answer is None),
    )
