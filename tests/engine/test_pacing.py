"""Promise: steps with running sequences come near the target and prompts never starve."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from engine.batch import Batch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.pacing import StepPacing
from engine.prediction import OutputPrediction
from kvstore.clock import ManualClock
from tests.engine.conftest import prompt, request, run


@pytest.mark.parametrize(("base", "slope"), [(0.01, 0.0001), (0.0, 0.002), (0.05, 0.00001)])
def test_the_fit_finds_a_line(base: float, slope: float) -> None:
    pacing = StepPacing(0.1, 32)
    for rows in (16, 48, 512, 100, 7):
        pacing.took(rows, base + slope * rows)
    assert pacing.fit() == pytest.approx((base, slope))
    rows = pacing.prompt_rows(16, 100_000)
    assert base + slope * (rows + 16) == pytest.approx(0.1, abs=2 * slope)


def test_it_follows_a_machine_that_slows_down() -> None:
    pacing = StepPacing(0.1, 32)
    for slope in (0.0001, 0.001):
        for step in range(200):
            rows = 16 + step % 3 * 100
            pacing.took(rows, 0.01 + slope * rows)
    assert pacing.fit()[1] == pytest.approx(0.001, rel=0.01)


def test_a_prompt_gets_its_minimum_whatever_the_target() -> None:
    pacing = StepPacing(0.001, 32)
    for rows in (16, 48, 512):
        pacing.took(rows, 1.0 + rows)
    assert pacing.prompt_rows(16, 512) == 32
    assert pacing.prompt_rows(500, 512) == 12, "nor more than the step's limit"
    assert pacing.prompt_rows(0, 512) == 512, "alone it delays nobody"


def test_before_it_knows_anything_it_limits_nothing() -> None:
    assert StepPacing(0.1, 32).prompt_rows(4, 512) == 508


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_steps_of_an_engine_keep_to_the_target(
    speculation: Literal["off", "ngram"], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine that takes 4 ms and 0.1 ms a row; 10 ms asked for: 60 rows, drafts included."""
    clock = ManualClock()
    config = EngineConfig(
        threads=1, pool_blocks=64, step_tokens_max=256, step_s_target=0.010, speculation=speculation
    )
    engine = Engine.load(tiny_folder, config, clock)
    compute = engine._runner.run
    rows: list[int] = []

    def timed(batch: Batch) -> torch.Tensor:
        rows.append(len(batch.positions))
        clock.advance(0.004 + 0.0001 * len(batch.positions))
        return compute(batch)

    monkeypatch.setattr(engine._runner, "run", timed)
    for name in "abcd":
        engine.admit(request(name, prompt(20, ord(name)), 100))
    for _ in range(5):
        engine.step()
    engine.admit(request("long", prompt(900), 2))
    rows.clear()
    results = run(engine)
    prompts = [count for count, result in zip(rows, results, strict=True) if result.tokens_computed > 30]
    assert all(57 <= count <= 60 for count in prompts[:-1])
    assert len(prompts) >= 900 // 60


def test_predictions_begin_careful_and_follow_the_news() -> None:
    prediction = OutputPrediction()
    assert prediction.tokens(10, 110) == 110
    for _ in range(1000):
        prediction.ended(10, 100)
    assert prediction.tokens(10, 110) == pytest.approx(20, abs=1)
    for _ in range(1000):
        prediction.ended(100, 100)
    assert prediction.tokens(10, 110) == pytest.approx(108, abs=3)
