"""Which blocks of a sequence are dear, said by ranges of its tokens, as engines know them.

    [RetentionRange(0, 512, priority=90), RetentionRange(512, None, priority=10, ttl_s=60)]

A block takes the highest priority of the ranges that touch it, of equal ones the longest time. Of a block
that none touches nothing is said. Source of the form: TensorRT-LLM's KvCacheRetentionConfig.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.core.retention import PRIORITY_DEFAULT, Retention
from kvstore.errors import ConfigError

RANGES_MAX: Final = 64
"""Of one call: each is looked at for each block."""


@dataclass(frozen=True, slots=True)
class RetentionRange:
    """Tokens `start_token` to before `end_token` (None: the end) of a sequence, counted from its first.

    `priority` is 0 (goes first) to 100 (goes last); with `ttl_s` it counts for so many seconds after a
    block's last use, then the block is of the default priority. Raises ConfigError out of bounds.
    """

    start_token: int
    end_token: int | None = None
    priority: int = PRIORITY_DEFAULT
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        Retention(self.priority, self.ttl_s)
        if self.start_token < 0 or (self.end_token is not None and self.end_token <= self.start_token):
            raise ConfigError(
                f"a range of the tokens {self.start_token} to {self.end_token}: it must begin at 0 or later "
                "and end behind its beginning, or with the sequence (None)"
            )


def check_ranges(ranges: Sequence[RetentionRange]) -> None:
    """Raises ConfigError when there are too many."""
    if len(ranges) > RANGES_MAX:
        raise ConfigError(f"{len(ranges)} ranges of retention in one call: give {RANGES_MAX} at most")


def of_block(ranges: Sequence[RetentionRange], chain_index: int, block_tokens: int) -> Retention | None:
    """What the ranges say of one block; None: nothing. O(ranges)."""
    first = chain_index * block_tokens
    touching = (
        r
        for r in ranges
        if r.start_token < first + block_tokens and (r.end_token is None or r.end_token > first)
    )
    dearest = max(
        touching, key=lambda r: (r.priority, math.inf if r.ttl_s is None else r.ttl_s), default=None
    )
    return None if dearest is None else Retention(dearest.priority, dearest.ttl_s)
