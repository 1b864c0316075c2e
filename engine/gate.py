"""What loading and computing cost this worker lately, and with that: which stored blocks it loads at all.

Learnt from every request: what reads of each tier took, by their length, queues on the way included, and what
computing took from admission to the first token, the engine's queue included. So a busy engine loads more and
a busy disk is asked for less. The decision itself is kvstore/policies/gate.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from kvstore.nouns import Tier
from kvstore.policies.gate import LoadCost, PrefillCost, worth_loading

__all__ = ["LoadGate"]

PROBE_EVERY: Final = 16
"""Of the runs that should be cut, one in so many is loaded all the same: else a rate could never mend."""
TRUSTED_AFTER: Final = 4
"""Measurements of a tier, or of computing, before anything is decided by them."""
OUTLIER: Final = 4.0
LEAST_S: Final = 1e-3
"""Reads are taken to cost so much at least when it is asked whether one stood still."""
_KEPT_READS: Final = 0.8
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


class _LoadFit:
    """Seconds = read_s + block_s * blocks, by least squares over the reads of late.

    A read that took more than OUTLIER times as long as expected counts as so much: a standstill says little
    of the next read. Where reads are too much alike to tell the two apart, all of it counts as read_s: in
    doubt, longer reads are not avoided.
    """

    def __init__(self) -> None:
        self.count = 0
        self._w = self._n = self._nn = self._s = self._ns = 0.0

    def loaded(self, blocks: int, seconds: float) -> None:
        if seconds <= 0:
            return
        if self.count:
            seconds = min(seconds, OUTLIER * max(self.cost().seconds(blocks), LEAST_S))
        self.count += 1
        self._w = _KEPT_READS * self._w + 1.0
        self._n = _KEPT_READS * self._n + blocks
        self._nn = _KEPT_READS * self._nn + blocks * blocks
        self._s = _KEPT_READS * self._s + seconds
        self._ns = _KEPT_READS * self._ns + blocks * seconds

    def cost(self) -> LoadCost:
        """Of what was measured; there must be some."""
        spread = self._w * self._nn - self._n * self._n
        block_s = (self._w * self._ns - self._n * self._s) / spread if spread > 0.01 * self._n**2 else 0.0
        read_s = (self._s - max(0.0, block_s) * self._n) / self._w
        if read_s < 0:
            return LoadCost(0.0, self._ns / self._nn)
        return LoadCost(read_s, max(0.0, block_s))


class LoadGate:
    """One worker's. `counters` are labelled "gate:..."."""

    def __init__(self, block_tokens: int, *, is_on: bool) -> None:
        self.counters: Counter[str] = Counter()
        self._block_tokens = block_tokens
        self._is_on = is_on
        self._tiers = {tier: _LoadFit() for tier in Tier}
        self._prefill = _PrefillFit()

    def admit(self, tiers: Sequence[Tier], prompt_tokens: int, *, start: int = 0) -> int:
        """How many blocks of a run to load. The run begins at token `start`."""
        if not self._is_on:
            return len(tiers)
        load = {int(tier): fit.cost() for tier, fit in self._tiers.items() if fit.count >= TRUSTED_AFTER}
        prefill = self._prefill.cost()
        worth = worth_loading(tiers, self._block_tokens, prompt_tokens, load, prefill, start=start)
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
                if not self._tiers[tier].count:
                    return
                seconds -= self._tiers[tier].cost().seconds(blocks)
        self._tiers[slowest].loaded(by_tier[slowest], seconds)

    def computed(self, start: int, end: int, seconds: float) -> None:
        """The KV of the tokens from `start` to `end` took so long."""
        self._prefill.computed(start, end, seconds)

    def gauges(self) -> dict[str, float]:
        """What is known now; 0: not measured yet."""
        cost = self._prefill.cost()
        gauges = {"gauge:prefill_token_s": cost.token_s, "gauge:prefill_position_s": cost.position_s}
        for tier, fit in self._tiers.items():
            load = fit.cost() if fit.count else LoadCost(0.0, 0.0)
            gauges[f"gauge:load_{tier.name.lower()}_read_s"] = load.read_s
            gauges[f"gauge:load_{tier.name.lower()}_block_s"] = load.block_s
        return gauges
