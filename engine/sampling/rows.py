"""What the sampler is asked and what it answers, a row of logits each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from engine.types import SamplingParams, TokenLogprobs

__all__ = ["NO_TOKEN", "Drawn", "SamplingRow"]

NO_TOKEN: Final = -1
"""The answer for a row whose highest logit is not a finite number: the model computed nonsense."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Whose next token a row of logits is for. `tokens` are the sequence's tokens up to the one being drawn,
    the first `prompt_len` of them its prompt's; how many they are is the position of the noise."""

    params: SamplingParams
    tokens: Sequence[int]
    prompt_len: int


class Drawn(NamedTuple):
    """A row's token, or NO_TOKEN; `logprobs` if its params ask for them and it has a token."""

    token_id: int
    logprobs: TokenLogprobs | None = None
