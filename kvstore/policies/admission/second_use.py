"""What was used twice is written: it has shown that it comes back."""

from __future__ import annotations

from kvstore.core.seams import ContinuationPredictor
from kvstore.core.uses import Uses


class SecondUse:
    def __init__(self, uses: Uses, predictor: ContinuationPredictor) -> None:
        self._counts = uses.counts

    def admits(self, slot: int, now: float) -> bool:
        return self._counts[slot] > 1
