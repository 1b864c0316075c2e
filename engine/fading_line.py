"""A line through (rows, seconds) of the last steps: the sums of least squares, the older ones fading."""

from __future__ import annotations

__all__ = ["FadingLine"]


class FadingLine:
    """`memory` is what is left of a sample's weight after each later one. Ten multiplications a sample."""

    __slots__ = ("_memory", "_rows", "_rows_rows", "_rows_seconds", "_seconds", "weight")

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self.weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        memory = self._memory
        self.weight = self.weight * memory + 1
        self._rows = self._rows * memory + rows
        self._seconds = self._seconds * memory + seconds
        self._rows_rows = self._rows_rows * memory + rows * rows
        self._rows_seconds = self._rows_seconds * memory + rows * seconds

    @property
    def means(self) -> tuple[float, float]:
        """Of rows and of seconds. There must have been a sample."""
        return self._rows / self.weight, self._seconds / self.weight

    @property
    def variance(self) -> float:
        """Of the rows."""
        rows = self._rows / self.weight
        return self._rows_rows / self.weight - rows * rows

    @property
    def covariance(self) -> float:
        """Of rows and seconds."""
        rows, seconds = self.means
        return self._rows_seconds / self.weight - rows * seconds
