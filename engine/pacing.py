"""How many rows a step may have, so that running sequences see no gap longer than asked for.

    seconds = a + b * rows        fitted online: least squares whose older samples fade
    rows    = (target - a) / b    of a step in which something decodes; without, nobody waits for it

What a row costs grows with its context and with who else uses the machine; fading by 5 % a step lets the fit
follow both. While all steps had about as many rows, b is taken for the mean cost of a row: too much, so the
first prompts come in small pieces, and by them the fit learns. Cost: ten multiplications a step.
"""

from __future__ import annotations

from typing import Final

__all__ = ["StepPacing"]

FADING: Final = 0.95
SPREAD_MIN: Final = 0.05
"""Of the mean number of rows: with less standard deviation a slope says nothing."""


class StepPacing:
    """`rows_min`: a prompt gets at least as many, whatever the target: it must come to its end."""

    def __init__(self, target_s: float, rows_min: int) -> None:
        self._target_s = target_s
        self._rows_min = rows_min
        self._weight = self._rows = self._seconds = self._rows_squared = self._product = 0.0

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` took so long."""
        self._weight = self._weight * FADING + 1
        self._rows = self._rows * FADING + rows
        self._seconds = self._seconds * FADING + seconds
        self._rows_squared = self._rows_squared * FADING + rows * rows
        self._product = self._product * FADING + rows * seconds

    def fit(self) -> tuple[float, float]:
        """(a, b) in seconds, neither negative; (0, 0) before the first step."""
        if not self._weight:
            return 0.0, 0.0
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_squared / self._weight - mean_rows**2
        if variance <= (SPREAD_MIN * mean_rows) ** 2:
            return 0.0, mean_s / mean_rows
        slope = max(0.0, (self._product / self._weight - mean_rows * mean_s) / variance)
        return max(0.0, mean_s - slope * mean_rows), slope

    def prompt_rows(self, decoding: int, rows_max: int) -> int:
        """Rows for prompts beside `decoding` ones: what the target leaves, at least `rows_min`, and never
        more than `rows_max` with the decoding ones together."""
        left = rows_max - decoding
        if not decoding:
            return left
        base, slope = self.fit()
        if slope:
            paced = int((self._target_s - base) / slope) - decoding
            left = min(left, max(paced, self._rows_min))
        return left
