"""A measured rate: how much a second, as it was lately. Exponentially weighted, so that it follows a change
within about ten measurements and no single one decides."""

from __future__ import annotations

from typing import Final

NEWEST_WEIGHT: Final = 0.2


class Rate:
    """Amounts over the seconds they took. Both are averaged, so a long measurement counts for more."""

    __slots__ = ("_amount", "_seconds")

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def measured(self, amount: float, seconds: float) -> None:
        """What took no measurable time tells nothing, and is left out."""
        if amount <= 0 or seconds <= 0:
            return
        weight = NEWEST_WEIGHT if self._seconds else 1.0
        self._amount += weight * (amount - self._amount)
        self._seconds += weight * (seconds - self._seconds)

    @property
    def a_second(self) -> float:
        """0: not measured yet."""
        return self._amount / self._seconds if self._seconds else 0.0
