"""How many drafts a step should verify: as many as bring more tokens a second, by what was measured.

A step of R rows takes b * (F + R) seconds: it reads all weights once (F, in rows' worth of time), and
computes each row. A guess is accepted with the chance that it and all before it in its draft come true. A row
that brings q tokens in that way pays when the step's rate does not fall by it:

    (N + q) / (F + R + 1) > N / (F + R)   <=>   q * (F + R) > N       N: tokens the step brings without it

Taken greedily, the likeliest guess of any sequence first, this ends where the rate is highest. With one
sequence and F = 14 (SmolLM2-135M on two cores) a guess pays from 7 % on; with 32 of them from 70 % on: then
rows are what a step costs. Draft lengths by expected gain: Leviathan et al. 2023, section 3.5.

Both F and the chances are measured as the engine runs, so where nothing comes true nothing is drafted.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

from engine.fading_line import FadingLine

__all__ = ["Acceptance", "StepCost", "allot"]

FIXED_ROWS_PRIOR: Final = 8.0
"""F before anything is measured."""
FIXED_ROWS_MAX: Final = 256.0
_PRIOR_STRENGTH: Final = 1.0  # as a variance of the row count, in rows squared
_MEMORY: Final = 0.97  # of steps: the last thirty or so count
_SECONDS_CLIP: Final = 3.0  # a step that took longer than so many times the mean was held up by others


class StepCost:
    """While all steps have the same number of rows they say nothing of the slope: then the prior does."""

    __slots__ = ("_line",)

    def __init__(self) -> None:
        self._line = FadingLine(_MEMORY)

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` decoding rows (no prompts: theirs cost otherwise) took `seconds`."""
        if self._line.weight:
            seconds = min(seconds, _SECONDS_CLIP * self._line.means[1])
        self._line.observe(rows, seconds)

    @property
    def fixed_rows(self) -> float:
        """F: what a step costs before its first row, in rows."""
        line = self._line
        if not line.weight or not line.means[1]:
            return FIXED_ROWS_PRIOR
        rows, seconds = line.means
        prior = seconds / (FIXED_ROWS_PRIOR + rows)
        slope = (line.covariance + _PRIOR_STRENGTH * prior) / (line.variance + _PRIOR_STRENGTH)
        if slope * (FIXED_ROWS_MAX + rows) <= seconds:
            return FIXED_ROWS_MAX
        return max(0.0, seconds / slope - rows)


class Acceptance:
    """How often a guess came true of late, given that those before it did. `prior` is believed like
    `prior_weight` guesses."""

    __slots__ = ("_hits", "_memory", "_trials")

    def __init__(self, memory: float) -> None:
        self._hits = self._trials = 0.0
        self._memory = memory

    def learn(self, came_true: bool) -> None:
        self._hits = self._hits * self._memory + came_true
        self._trials = self._trials * self._memory + 1

    def chance(self, prior: float, prior_weight: float) -> float:
        return (self._hits + prior * prior_weight) / (self._trials + prior_weight)


def allot(
    candidates: Sequence[Sequence[float]], tokens: int, rows: int, fixed_rows: float, budget: int
) -> list[int]:
    """How many tokens of each draft to verify, at most `budget` together, in a step that has `rows` rows and
    brings `tokens` tokens without them. A candidate is a draft's chances: that each of its tokens comes true
    if those before it did. About 1 us a token."""
    lengths = [0] * len(candidates)
    likeliest = [(-chances[0], index) for index, chances in enumerate(candidates) if chances]
    heapq.heapify(likeliest)
    expected, size = float(tokens), fixed_rows + rows
    while likeliest and budget > 0 and -likeliest[0][0] * size > expected:
        negative, index = likeliest[0]
        lengths[index] += 1
        expected, size, budget = expected - negative, size + 1, budget - 1
        if lengths[index] < len(candidates[index]):
            heapq.heapreplace(likeliest, (negative * candidates[index][lengths[index]], index))
        else:
            heapq.heappop(likeliest)
    return lengths
