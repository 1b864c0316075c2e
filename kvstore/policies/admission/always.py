"""Everything is written: 76 % of a conversation trace's blocks are used once, for nothing."""

from __future__ import annotations

from kvstore.core.seams import ContinuationPredictor
from kvstore.core.uses import Uses


class Always:
    def __init__(self, uses: Uses, predictor: ContinuationPredictor) -> None:
        pass

    def admits(self, slot: int, now: float) -> bool:
        return True
