"""Promise: batch invariance is computed with where it holds, and refused where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from engine.device import HostDevice
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.runner import Runner
from engine.step_invariance import check_step_invariance
from engine.tokenizer import Tokenizer
from engine.weights import load_weights
from kvstore.clock import MonotonicClock
from kvstore.errors import ConfigError
from tests.engine.conftest import EngineFactory


def check(runner: Runner, n_slots: int) -> None:
    check_step_invariance(
        runner.run, vocab_size=259, block_tokens=32, n_slots=n_slots, rows_max=6, tokens_max=256
    )


@pytest.mark.parametrize("n_slots", [1, 2, 5, 12])
def test_a_runner_that_is_invariant_passes(make_engine: EngineFactory, n_slots: int) -> None:
    check(make_engine(pool_blocks=n_slots, running_max=6)._runner, n_slots)


def test_one_that_is_not_is_refused(make_engine: EngineFactory) -> None:
    plain = make_engine(pool_blocks=12, batch_invariant=False, dtype="float32")._runner
    with pytest.raises(ConfigError, match="set it to false or device to cpu"):
        check(plain, 12)


def test_a_device_is_asked_when_its_engine_is_made(tiny_folder: Path, make_engine: EngineFactory) -> None:
    here = make_engine(max_model_len=256, running_max=6)
    weights = load_weights(tiny_folder, here.model_config, here.pool.dtype)
    model_config = ModelConfig.from_folder(tiny_folder)
    with pytest.raises(ConfigError, match="batch_invariant cannot be promised here"):
        Engine(
            here.config, model_config, weights, cast(Tokenizer, None), MonotonicClock(), device=HostDevice()
        )
