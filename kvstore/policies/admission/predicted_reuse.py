"""What was used twice is written, and what ends a session that is likely to go on within ten minutes.

Ten minutes catch 95 % of the continuations of a conversation trace. The threshold lies between what its
first turn (27 %) and its second (41 %) promise, so that sessions are written from their second turn on.
"""

from __future__ import annotations

from typing import Final

from kvstore.core.seams import ContinuationPredictor
from kvstore.core.uses import Uses

_WITHIN_S: Final = 600.0
_PROBABILITY_MIN: Final = 0.35


class PredictedReuse:
    def __init__(self, uses: Uses, predictor: ContinuationPredictor) -> None:
        self._counts = uses.counts
        self._predictor = predictor

    def admits(self, slot: int, now: float) -> bool:
        return self._counts[slot] > 1 or (
            self._predictor.probability(slot, _WITHIN_S, now) >= _PROBABILITY_MIN
        )
