"""A measured rate: how much a second, as it was lately. Exponentially weighted, so that it follows a change
within some twenty measurements and no single one decides: not even one that a standstill fell into."""

from __future__ import annotations

from typing import Final

NEWEST_WEIGHT: Final = 0.2
FASTER_WEIGHT: Final = 0.5  # of what was OUTLIER times as fast
OUTLIER: Final = 4.0  # times as slow as lately: what took longer counts as so much


class Rate:
    """Amounts over the seconds they took. Both are averaged, so a long measurement counts for more."""

    __slots__ = ("_amount", "_seconds", "count")

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0
        self.count = 0  # measurements so far

    def measured(self, amount: float, seconds: float) -> None:
        """What took no measurable time tells nothing, nor does a first try that came to nothing."""
        if seconds <= 0 or amount < 0 or not (amount or self._seconds):
            return
        weight = NEWEST_WEIGHT if self._seconds else 1.0
        if amount and self._amount:
            expected_s = amount * self._seconds / self._amount
            seconds = min(seconds, OUTLIER * expected_s)
            if OUTLIER * seconds < expected_s:  # that is no accident: nothing is done sooner than it can be
                weight = FASTER_WEIGHT
        self.count += 1
        self._amount += weight * (amount - self._amount)
        self._seconds += weight * (seconds - self._seconds)

    @property
    def a_second(self) -> float:
        """0: not measured yet."""
        return self._amount / self._seconds if self._seconds else 0.0
