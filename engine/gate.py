"""What loading and computing cost this worker lately, and with that: which stored blocks it loads at all.

Rates are learnt from every request: what each tier gave a second, queues on the way included, and what
computing took from admission to the first token, the engine's queue included. So a busy engine loads more
and a busy disk is asked for less. The decision itself is kvstore/policies/gate.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from kvstore.nouns import Tier
from kvstore.policies.gate import PrefillCost, worth_loading
from kvstore.rates import Rate

__all__ = ["LoadGate"]

PROBE_EVERY: Final = 16
"""Of the runs that should be cut, one in so many is loaded all the same: else a rate could never mend."""
TRUSTED_AFTER: Final = 4
"""Measurements of a tier, or of computing, before anything is decided by them."""
_KEPT: Final = 0.95  # of what earlier prompts say, with each new one


class _PrefillFit:
    """Seconds = token_s * tokens + position_s * (sum of their positions), by least squares over what was
    measured lately. Where prompts are too much alike to tell the two apart, all of it counts as token_s."""

    def __init__(self) -> None:
        self._tt = self._tp = self._pp = self._ts = self._ps = 0.0
        self._count = 0

    def computed(self, start: int, end: int, seconds: float) -> None:
        tokens, positions = float(end - start), (end * end - start * start) / 2
        if tokens <= 0 or seconds <= 0:
            return
        self._count += 1
        self._tt = _KEPT * self._tt + tokens * tokens
        self._tp = _KEPT * self._tp + tokens * positions
        self._pp = _KEPT * self._pp + positions * positions
        self._ts = _KEPT * self._ts + tokens * seconds
        self._ps = _KEPT * self._ps + positions * seconds

    def cost(self) -> PrefillCost:
        if self._count < TRUSTED_AFTER:
            return PrefillCost()
        apart = self._tt * self._pp - self._tp * self._tp
        if apart > 0.01 * self._tt * self._pp:
            token_s = (self._ts * self._pp - self._ps * self._tp) / apart
            position_s = (self._ps * self._tt - self._ts * self._tp) / apart
            if token_s > 0 and position_s >= 0:
                return PrefillCost(token_s, position_s)
        return PrefillCost(self._ts / self._tt)


class LoadGate:
    """One worker's. `counters` are labelled "gate:..."."""

    def __init__(self, block_nbytes: int, block_tokens: int, *, is_on: bool) -> None:
        self.counters: Counter[str] = Counter()
        self._block_nbytes = block_nbytes
        self._block_tokens = block_tokens
        self._is_on = is_on
        self._tiers = {tier: Rate() for tier in Tier}
        self._prefill = _PrefillFit()

    def admit(self, tiers: Sequence[Tier], prompt_tokens: int, *, start: int = 0) -> int:
        """How many blocks of a run to load. The run begins at token `start`."""
        if not self._is_on:
            return len(tiers)
        rates = {int(t): rate.a_second for t, rate in self._tiers.items() if rate.count >= TRUSTED_AFTER}
        worth = worth_loading(
            tiers,
            self._block_nbytes,
            self._block_tokens,
            prompt_tokens,
            rates,
            self._prefill.cost(),
            start=start,
        )
        if worth == len(tiers):
            return worth
        self.counters["gate:cut_runs"] += 1
        if self.counters["gate:cut_runs"] % PROBE_EVERY == 0:
            self.counters["gate:probes"] += 1
            return len(tiers)
        self.counters["gate:blocks"] += len(tiers) - worth
        return worth

    def loaded(self, tiers: Sequence[Tier], arrived: int, seconds: float) -> None:
        """So many of the blocks arrived in this time: of which tiers, says what was asked for.

        Of a run over several tiers the slowest one is measured, by what the others leave of the time.
        """
        by_tier = Counter(tiers[:arrived] if arrived else tiers)
        if not by_tier:
            return
        slowest = max(by_tier)
        for tier, blocks in by_tier.items():
            if tier != slowest:
                rate = self._tiers[tier].a_second
                if not rate:
                    return
                seconds -= blocks * self._block_nbytes / rate
        nbytes = by_tier[slowest] * self._block_nbytes if arrived else 0
        self._tiers[slowest].measured(nbytes, seconds)

    def computed(self, start: int, end: int, seconds: float) -> None:
        """The KV of the tokens from `start` to `end` took so long."""
        self._prefill.computed(start, end, seconds)

    def gauges(self) -> dict[str, float]:
        """What is known now; 0: not measured yet."""
        cost = self._prefill.cost()
        measured = {
            f"gauge:load_{tier.name.lower()}_nbytes_s": rate.a_second for tier, rate in self._tiers.items()
        }
        return measured | {"gauge:prefill_tokens_s": 1 / cost.token_s if cost.token_s else 0.0}
