"""How much of its `max_tokens` a sequence will use: a running mean over those that ended.

Admission counts on it, so a wrong guess costs either room that nobody uses or a preemption, never a token.
It begins at all of it, with the weight of a few sequences, and forgets: the newest few hundred decide.
"""

from __future__ import annotations

from typing import Final

__all__ = ["OutputPrediction"]

PRIOR_WEIGHT: Final = 8
"""Ended sequences that the first guess (all of it) weighs as much as."""
WINDOW: Final = 256
"""No sequence weighs less than one in so many."""


class OutputPrediction:
    """`share`: of the tokens that a sequence may generate, those that one has generated in the mean."""

    def __init__(self) -> None:
        self.share = 1.0
        self._ended = 0

    def ended(self, output_tokens: int, output_tokens_max: int) -> None:
        """One came to its own end (not aborted, not failed)."""
        self._ended += 1
        weight = 1 / min(self._ended + PRIOR_WEIGHT, WINDOW)
        self.share += (output_tokens / output_tokens_max - self.share) * weight

    def tokens(self, known: int, longest: int) -> int:
        """Tokens that a sequence of `known` ones is expected to end with, of `longest` at most."""
        return known + max(0, round((longest - known) * self.share))
