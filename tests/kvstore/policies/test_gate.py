"""Load or compute: the cheaper of the two by what was measured, and loading wherever there is doubt."""

from __future__ import annotations

import itertools
import random

import pytest

from kvstore.nouns import Tier
from kvstore.policies.gate import MARGIN, SAVES_S_MIN, LoadCost, PrefillCost, worth_loading

HOST, NVME = Tier.HOST, Tier.NVME
TOKENS = 32
FAST = {HOST: 1e-3, NVME: 1e-2}  # seconds a block


def worth(
    tiers: list[Tier], block_s: dict[Tier, float], cost: PrefillCost, start: int = 0, read_s: float = 0.0
) -> int:
    prompt = start + len(tiers) * TOKENS + 5
    load = {int(tier): LoadCost(read_s, seconds) for tier, seconds in block_s.items()}
    return worth_loading(tiers, TOKENS, prompt, load, cost, start=start)


def wait_s(k: int, tiers: list[Tier], block_s: dict[Tier, float], cost: PrefillCost, read_s: float) -> float:
    """The rule as its docstring has it, the slow way: one token after the other."""
    prompt = len(tiers) * TOKENS + 5
    loading = sum(block_s[tier] for tier in tiers[:k]) + read_s * len(set(tiers[:k]))
    computing = sum(cost.token_s + cost.position_s * (p + 0.5) for p in range(k * TOKENS, prompt))
    return loading + computing


@pytest.mark.parametrize(
    ("tiers", "token_s", "loaded"),
    [
        ([HOST] * 8, 1e-3, 8),  # 32 ms to compute, 1 ms to load
        ([NVME] * 8, 1e-3, 8),  # 32 against 10
        ([HOST] * 4 + [NVME] * 4, 1e-4, 4),  # 3.2 ms to compute: the host pays, the disk does not
        ([NVME] * 8, 1e-4, 0),
        ([HOST] * 8, 1e-5, 8),  # 0.3 ms to compute, and all of it saves 5: no use to cut
        ([HOST] * 80, 1e-5, 0),  # a fast engine far from its store
        ([], 1e-5, 0),
    ],
)
def test_the_cheaper_way_is_taken(tiers: list[Tier], token_s: float, loaded: int) -> None:
    assert worth(tiers, FAST, PrefillCost(token_s)) == loaded


def test_what_was_never_measured_is_loaded() -> None:
    cheap = PrefillCost(1e-9)
    assert worth([NVME] * 8, {HOST: 1e-3}, cheap) == 8
    assert worth([HOST, NVME], {HOST: 9.0}, cheap) == 2
    assert worth([NVME] * 8, FAST, PrefillCost()) == 8


def test_positions_far_out_are_dearer_and_are_loaded() -> None:
    """Computing a block costs less than loading it at the start of the prompt, and more at its end; all that
    stands before must come along."""
    cost = PrefillCost(1e-6, 1e-6)
    assert worth([NVME] * 10, FAST, cost) == 0
    assert worth([NVME] * 60, FAST, cost) == 60
    assert worth([NVME] * 10, FAST, cost, start=3200) == 10, "the same blocks, behind what is here already"


def test_it_never_waits_longer_than_the_best_way_but_for_the_margin() -> None:
    draw = random.Random(7)
    cuts = 0
    for _ in range(300):
        tiers = [draw.choice((HOST, NVME)) for _ in range(draw.randrange(1, 12))]
        block_s = {HOST: 10 ** draw.uniform(-4, -1), NVME: 10 ** draw.uniform(-3, 0)}
        read_s = draw.choice((0.0, 10 ** draw.uniform(-3, 0)))
        cost = PrefillCost(10 ** draw.uniform(-6, -2), draw.choice((0.0, 10 ** draw.uniform(-9, -5))))
        chosen = worth(tiers, block_s, cost, read_s=read_s)
        waits = [wait_s(k, tiers, block_s, cost, read_s) for k in range(len(tiers) + 1)]
        if chosen < len(tiers):
            cuts += 1
            assert waits[chosen] == pytest.approx(min(waits))
        assert waits[chosen] <= max(min(waits) / (1 - MARGIN), min(waits) + SAVES_S_MIN) * 1.001
    assert 30 < cuts < 270, "both ways are seen"


def test_what_a_read_costs_at_all_is_paid_once_and_short_runs_are_computed() -> None:
    cost = PrefillCost(1e-3)  # 32 ms a block
    assert worth([HOST] * 2, {HOST: 1e-4}, cost, read_s=0.1) == 0
    assert worth([HOST] * 20, {HOST: 1e-4}, cost, read_s=0.1) == 20


def test_faster_loading_never_loads_less() -> None:
    for token_s, (slow, fast) in itertools.product(
        (1e-6, 1e-4, 1e-2), itertools.pairwise((1.0, 1e-1, 1e-2, 1e-3))
    ):
        cost = PrefillCost(token_s)
        assert worth([NVME] * 9, {NVME: slow}, cost) <= worth([NVME] * 9, {NVME: fast}, cost)
