"""What the sampler is asked and what it answers, a row of logits each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from engine.sampling.adjust import LogitAdjuster
from engine.sampling.constraint import TokenConstraint
from engine.types import SamplingParams, TokenLogprobs

__all__ = ["NOTHING_ALLOWED", "NO_TOKEN", "Drawn", "SamplingRow"]

NO_TOKEN: Final = -1
"""The answer for a row whose highest logit is not a finite number: the model computed nonsense."""

NOTHING_ALLOWED: Final = -2
"""The answer for a row of whose tokens the request's own constraint and min_tokens left none."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Whose next token a row of logits is for. `tokens` are the sequence's tokens up to the one being drawn,
    the first `prompt_len` of them its prompt's; how many they are is the position of the noise. The last
    `drafts` of them are guesses that may be taken back.

    `adjuster` is the sequence's own, made from `params`, `prompt_len` and `end_token_ids`: without it one is
    made for the row, which draws the same and costs a count of all tokens. `constraint` has accepted the
    output but not the drafts."""

    params: SamplingParams
    tokens: Sequence[int]
    prompt_len: int
    end_token_ids: frozenset[int] = frozenset()
    adjuster: LogitAdjuster | None = None
    constraint: TokenConstraint | None = None
    drafts: int = 0

    @property
    def is_plain(self) -> bool:
        """Do temperature, min_p, top_k, top_p and the noise alone decide, and is only the token asked for?"""
        return (
            self.params.logprobs is None
            and self.constraint is None
            and not LogitAdjuster.changes_anything(self.params)
        )


class Drawn(NamedTuple):
    """A row's token, or NO_TOKEN or NOTHING_ALLOWED; `logprobs` if its params ask for them and it has one."""

    token_id: int
    logprobs: TokenLogprobs | None = None
