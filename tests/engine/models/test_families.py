"""Promise: the forward pass is the model's own: logits and greedy output equal transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.models.families import FAMILIES
from tests.engine.conftest import EngineFactory, Logits, prompt, request, run, tokens_of
from tests.engine.models.family_models import (
    CASES,
    WINDOW,
    family_config,
    family_model,
    greedy,
    save_family_model,
)


def generated(engine: Engine, tokens: tuple[int, ...], count: int) -> list[int]:
    engine.admit(request("probe", tokens, count, seed=1))
    return tokens_of(run(engine), "probe")


def test_the_cases_cover_every_family() -> None:
    assert {family for family, _ in CASES.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(
    case: str,
    batch_invariant: bool,
    tmp_path: Path,
    make_engine: EngineFactory,
    seen_logits: Logits,
) -> None:
    """A prompt in chunks, beyond every window and over a tile's end, then a few tokens one by one."""
    model = family_model(case)
    folder = save_family_model(model, tmp_path)
    engine = make_engine(folder, batch_invariant=batch_invariant, step_tokens_max=100)
    expected = greedy(model, prompt(290), 6)
    tokens = generated(engine, prompt(290), 6)
    for index, logits in enumerate(expected):
        torch.testing.assert_close(seen_logits[1, 290 + index], logits, rtol=1e-4, atol=1e-4)
    assert tokens == [int(logits.argmax()) for logits in expected]


@pytest.mark.parametrize("case", ["mistral-window", "qwen2-window", "qwen3-window"])
def test_a_window_moves_the_logits(case: str) -> None:
    """The proof that the comparison above sees one."""
    windowed, whole = family_model(case), family_model(case, sliding_window=2000)
    left, right = greedy(windowed, prompt(290), 1)[0], greedy(whole, prompt(290), 1)[0]
    assert (left - right).abs().max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_windows_are_those_of_the_config(case: str, tmp_path: Path) -> None:
    family_config(case).save_pretrained(tmp_path)
    windows = ModelConfig.from_folder(tmp_path).windows
    expected = {
        "mistral-window": (WINDOW, WINDOW),
        "mistral-window-of-tiles": (257, 257),
        "mistral-window-yarn": (33, 33),
        "qwen2-window": (None, WINDOW, WINDOW),
        "qwen3-window": (WINDOW, None, WINDOW),
    }
    assert windows == expected.get(case, (None,) * len(windows))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_half_precision_stays_near_float32(
    case: str,
    batch_invariant: bool,
    dtype: str,
    tmp_path: Path,
    make_engine: EngineFactory,
    seen_logits: Logits,
) -> None:
    """It works and is coarse."""
    model = family_model(case)
    folder = save_family_model(model, tmp_path)
    generated(make_engine(folder, dtype=dtype, batch_invariant=batch_invariant), prompt(290), 1)
    exact, coarse = greedy(model, prompt(290), 1)[0], seen_logits[1, 290]
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - exact).norm() < (0.06 if dtype == "bfloat16" else 0.01) * exact.norm()


@pytest.mark.parametrize("case", ["mistral-window", "qwen2-tied", "qwen3"])
def test_shards_are_read_as_one_model(
    case: str, tmp_path: Path, make_engine: EngineFactory, seen_logits: Logits
) -> None:
    model = family_model(case)
    folder = save_family_model(model, tmp_path, shard="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    generated(make_engine(folder), prompt(100), 1)
    torch.testing.assert_close(seen_logits[1, 100], greedy(model, prompt(100), 1)[0], rtol=1e-4, atol=1e-4)
