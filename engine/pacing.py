"""How many rows a step may have, so that running sequences see no gap longer than asked for.

    seconds = a + b * rows        fitted online: least squares whose older samples fade
    rows    = (target - a) / b    of a step in which something decodes; without, nobody waits for it

What a row costs grows with its context and with who else uses the machine; fading by 5 % a step lets the fit
follow both. While all steps had about as many rows, b is taken for the mean cost of a row: too much, so the
first prompts come in small pieces, and by them the fit learns.
"""

from __future__ import annotations

from typing import Final

from engine.fading_line import FadingLine

__all__ = ["StepPacing"]

FADING: Final = 0.95
SPREAD_MIN: Final = 0.05
"""Of the mean number of rows: with less standard deviation a slope says nothing."""


class StepPacing:
    """`rows_min`: a prompt gets at least as many, whatever the target: it must come to its end."""

    def __init__(self, target_s: float, rows_min: int) -> None:
        self._target_s = target_s
        self._rows_min = rows_min
        self._line = FadingLine(FADING)

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` took so long."""
        self._line.observe(rows, seconds)

    def fit(self) -> tuple[float, float]:
        """(a, b) in seconds, neither negative; (0, 0) before the first step."""
        line = self._line
        if not line.weight:
            return 0.0, 0.0
        mean_rows, mean_s = line.means
        if line.variance <= (SPREAD_MIN * mean_rows) ** 2:
            return 0.0, mean_s / mean_rows
        slope = max(0.0, line.covariance / line.variance)
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
