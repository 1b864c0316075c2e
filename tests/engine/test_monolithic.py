"""Promise: `generate` is the whole output of one process, wherever it starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.monolithic import generate
from tests.engine.conftest import EngineFactory, prompt, request, run, tokens_of


def test_it_equals_stepping_by_hand(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(40), 10))
    by_hand = tuple(tokens_of(run(engine), "a"))
    assert generate(engine, request("a", prompt(40), 10)) == by_hand
    assert generate(engine, request("a", prompt(40), 10, output=by_hand[:4])) == by_hand
    assert engine.free_blocks == 64


def test_an_error_is_raised(make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()

    def nonsense(logits: torch.Tensor, *_: object) -> list[int]:
        return np.full(logits.shape[0], -1).tolist()

    monkeypatch.setattr("engine.sampler.Sampler.sample", staticmethod(nonsense))
    with pytest.raises(RuntimeError, match="not finite"):
        generate(engine, request("a", prompt(40), 10))
