"""Promise: guesses are verified where they pay by what was measured, and not where they do not."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.speculation.payoff import FIXED_ROWS_PRIOR, Acceptance, StepCost, allot


def rate(
    candidates: list[list[float]], lengths: tuple[int, ...], tokens: int, rows: int, fixed: float
) -> float:
    expected = sum(
        math.prod(chances[: i + 1]) for chances, n in zip(candidates, lengths, strict=True) for i in range(n)
    )
    return (tokens + expected) / (fixed + rows + sum(lengths))


@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=4), min_size=1, max_size=3),
    st.integers(0, 6),
    st.floats(0, 40),
    st.integers(0, 12),
)
def test_no_other_choice_within_the_budget_has_a_higher_rate(
    candidates: list[list[float]], others: int, fixed: float, budget: int
) -> None:
    running = len(candidates) + others
    lengths = tuple(allot(candidates, running, running, fixed, budget))
    assert sum(lengths) <= budget
    choices = itertools.product(*(range(len(chances) + 1) for chances in candidates))
    best = max(
        rate(candidates, choice, running, running, fixed) for choice in choices if sum(choice) <= budget
    )
    assert rate(candidates, lengths, running, running, fixed) == pytest.approx(best)


def test_what_pays_alone_does_not_in_a_crowd() -> None:
    unsure, sure = [0.3] * 4, [0.95] * 4
    assert allot([unsure], 1, 1, 14.0, 100) == [2]
    assert allot([unsure] * 32, 32, 32, 14.0, 1000) == [0] * 32
    assert allot([sure] * 32, 32, 32, 14.0, 1000) == [3] * 32


def test_the_cost_of_a_step_is_learned_and_learned_again() -> None:
    cost = StepCost()
    assert cost.fixed_rows == FIXED_ROWS_PRIOR
    for _ in range(100):
        cost.observe(1, 0.060)
    assert cost.fixed_rows == pytest.approx(FIXED_ROWS_PRIOR), "equal steps say nothing of a row's cost"
    for step in range(200):
        rows = 1 + step % 9
        cost.observe(rows, 0.060 + 0.004 * rows)
    assert cost.fixed_rows == pytest.approx(15, rel=0.15)
    for step in range(300):
        rows = 1 + step % 9
        cost.observe(rows, 0.030 * rows)
    assert cost.fixed_rows < 1.5, "rows are all it costs now"


def test_a_step_that_was_held_up_teaches_little() -> None:
    cost = StepCost()
    for step in range(200):
        rows = 1 + step % 9
        cost.observe(rows, 30.0 if step == 190 else 0.060 + 0.004 * rows)
    assert 4 < cost.fixed_rows < 60


def test_a_machine_without_slope_or_time_breaks_nothing() -> None:
    cost = StepCost()
    for step in range(100):
        cost.observe(1 + step % 9, 0.0)
    assert cost.fixed_rows == FIXED_ROWS_PRIOR
    for step in range(100):
        cost.observe(1 + step % 9, 1.0 / (1 + step % 9))
    assert 0 <= cost.fixed_rows <= 256


def test_chances_follow_what_came_true_of_late() -> None:
    acceptance = Acceptance(0.95)
    assert acceptance.chance(0.5, 4.0) == 0.5
    for _ in range(60):
        acceptance.learn(False)
    assert acceptance.chance(0.5, 4.0) < 0.1
    for _ in range(60):
        acceptance.learn(True)
    assert acceptance.chance(0.5, 4.0) > 0.85
