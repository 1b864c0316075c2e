"""A worker's gate: it decides by what it measured, knows when it knows too little, and finds out again."""

from __future__ import annotations

import pytest

from engine.gate import PROBE_EVERY, TRUSTED_AFTER, LoadGate
from kvstore.nouns import Tier

TOKENS = 32
HOST, NVME = Tier.HOST, Tier.NVME


def gate(*, is_on: bool = True) -> LoadGate:
    return LoadGate(TOKENS, is_on=is_on)


def teach(
    made: LoadGate, *, block_s: float, token_s: float, tier: Tier = NVME, times: int = TRUSTED_AFTER
) -> LoadGate:
    for i in range(times):
        made.loaded([tier] * (4 + i % 3), 4 + i % 3, (4 + i % 3) * block_s)
        made.computed(0, 128, 128 * token_s)
    return made


def test_slow_disks_are_not_waited_for_and_fast_ones_are() -> None:
    assert teach(gate(), block_s=0.1, token_s=1e-4).admit([NVME] * 8, 300) == 0
    assert teach(gate(), block_s=0.001, token_s=1e-3).admit([NVME] * 8, 300) == 8


def test_a_little_knowledge_decides_nothing() -> None:
    assert gate().admit([NVME] * 8, 300) == 8
    assert teach(gate(), block_s=9.0, token_s=1e-4, times=TRUSTED_AFTER - 1).admit([NVME] * 8, 300) == 8


def test_what_is_on_the_host_is_loaded_whatever_the_disk_does() -> None:
    made = teach(gate(), block_s=5.0, token_s=1e-3)
    teach(made, block_s=1e-3, token_s=1e-3, tier=HOST)
    assert made.admit([HOST] * 8, 300) == 8
    assert made.admit([HOST] * 5 + [NVME] * 3, 300) == 5
    assert made.counters["gate:blocks"] == 3


def test_it_can_be_turned_off() -> None:
    made = teach(gate(is_on=False), block_s=9.0, token_s=1e-4)
    assert made.admit([NVME] * 8, 300) == 8
    assert not made.counters


def test_one_run_in_some_is_loaded_all_the_same_so_that_a_mended_disk_is_found() -> None:
    made = teach(gate(), block_s=0.1, token_s=1e-4)
    answers = [made.admit([NVME] * 8, 300) for _ in range(PROBE_EVERY)]
    assert answers == [0] * (PROBE_EVERY - 1) + [8]
    for blocks in (8, 6) * 8:
        made.loaded([NVME] * blocks, blocks, 1e-4 * blocks)
    assert made.admit([NVME] * 8, 300) == 8


def test_a_standstill_once_closes_no_gate() -> None:
    made = teach(gate(), block_s=1e-3, token_s=1e-3, tier=HOST)
    made.loaded([HOST] * 4, 4, 60.0)
    assert made.admit([HOST] * 8, 300) == 8


def test_a_tier_that_only_costs_its_time_is_learnt_to_be_slow() -> None:
    made = teach(gate(), block_s=1e-3, token_s=1e-3)
    for _ in range(40):
        made.loaded([NVME] * 8, 0, 5.0)
    assert made.admit([NVME] * 8, 300) == 0


def test_of_a_mixed_run_the_slow_tier_is_measured_by_what_the_fast_one_leaves() -> None:
    made = gate()
    made.loaded([HOST, NVME], 2, 0.5)  # which of the two was it? nobody knows yet
    assert made.gauges()["gauge:load_nvme_read_s"] == 0
    for blocks in (2, 4):
        made.loaded([HOST] * blocks, blocks, 2e-3 + 1e-3 * blocks)
    for blocks in (1, 3):
        made.loaded([HOST] * 2 + [NVME] * blocks, 2 + blocks, 4e-3 + 0.01 + 0.02 * blocks)
    told = made.gauges()
    assert told["gauge:load_host_read_s"] == pytest.approx(2e-3)
    assert told["gauge:load_host_block_s"] == pytest.approx(1e-3)
    assert told["gauge:load_nvme_read_s"] == pytest.approx(0.01)
    assert told["gauge:load_nvme_block_s"] == pytest.approx(0.02)


def test_reads_that_are_all_alike_say_nothing_against_longer_ones() -> None:
    """What reads of one block cost in a busy moment is not what every block of a long run costs."""
    made = gate()
    for _ in range(2 * TRUSTED_AFTER):
        made.loaded([HOST], 1, 0.012)
        made.computed(0, 100, 0.022)
    assert made.admit([HOST] * 32, 32 * TOKENS) == 32


def test_what_attention_costs_is_told_from_what_every_token_costs() -> None:
    made, token_s, position_s = gate(), 5e-4, 5e-7
    for start, end in ((0, 100), (0, 2000), (500, 900), (1500, 2000), (0, 1000)):
        seconds = token_s * (end - start) + position_s * (end * end - start * start) / 2
        made.computed(start, end, seconds)
    cost = made._prefill.cost()
    assert cost.token_s == pytest.approx(token_s)
    assert cost.position_s == pytest.approx(position_s)
    alike = teach(gate(), block_s=1.0, token_s=token_s)
    assert alike._prefill.cost().token_s == pytest.approx(token_s)
    assert alike._prefill.cost().position_s == 0
