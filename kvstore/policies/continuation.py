"""Will this session go on? By its turn and by how long ago it was used, learnt from what the core sees.

Of each turn is counted how many uses there were (N), how many of them another one went on from (R) and after
how long (S, in seconds): p = R / N, tau = S / R. With exponential gaps, a session that was let go `a` seconds
ago and has not come back goes on within the next `w` seconds with probability

    p e^(-a / tau) (1 - e^(-w / tau)) / (1 - p + p e^(-a / tau))

Priors are what the Mooncake conversation trace shows: p 0.27, 0.41, 0.55, 0.63, 0.78, 0.92 at turns 1, 2, 3,
4-5, 6-10 and later, tau 180 s, worth 50 uses. Counts are halved every 5,000 uses. O(1) a use.
"""

from __future__ import annotations

from math import exp
from typing import Final

from kvstore.core.uses import Use, Uses
from kvstore.core.versions import NONE

_PRIOR_P: Final = (0.27, 0.41, 0.55, 0.63, 0.78, 0.92)
_PRIOR_TAU_S: Final = 180.0
_PRIOR_USES: Final = 50.0
_USES_BETWEEN_HALVINGS: Final = 5_000
_P_MAX: Final = 0.999


class Continuation:
    """Fills `core.seams.ContinuationPredictor`."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._ended = [_PRIOR_USES] * len(_PRIOR_P)
        self._went_on = [_PRIOR_USES * p for p in _PRIOR_P]
        self._gaps_s = [went_on * _PRIOR_TAU_S for went_on in self._went_on]
        self._after = _USES_BETWEEN_HALVINGS

    def observe(self, use: Use) -> None:
        self._ended[_bin(use.turn)] += 1
        if use.base != NONE and use.turn == self._uses.turns[use.base] + 1:
            before = _bin(use.turn - 1)
            self._went_on[before] += 1
            self._gaps_s[before] += use.now - self._uses.used_s[use.base]
        self._after -= 1
        if not self._after:
            self._after = _USES_BETWEEN_HALVINGS
            for sums in (self._ended, self._went_on, self._gaps_s):
                sums[:] = (total / 2 for total in sums)

    def probability(self, slot: int, within_s: float, now: float) -> float:
        turn = _bin(self._uses.turns[slot])
        p = min(_P_MAX, self._went_on[turn] / self._ended[turn])
        tau_s = max(1e-3, self._gaps_s[turn] / self._went_on[turn])
        still = p * exp(-max(0.0, now - self._uses.used_s[slot]) / tau_s)
        return still * (1 - exp(-within_s / tau_s)) / (1 - p + still)


def _bin(turn: int) -> int:
    if turn < 4:
        return max(0, turn - 1)
    return 3 if turn < 6 else 4 if turn < 11 else 5
