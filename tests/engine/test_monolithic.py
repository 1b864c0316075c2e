"""Promise: `generate` is the whole output of one process, wherever it starts from."""

from __future__ import annotations

import pytest
import torch

from engine.monolithic import generate, generate_all
from engine.sampling.rows import NO_TOKEN, Drawn
from tests.engine.conftest import EngineFactory, prompt, request, run, tokens_of


def test_it_equals_stepping_by_hand(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.admit(request("a", prompt(40), 10))
    by_hand = tuple(tokens_of(run(engine), "a"))
    assert generate(engine, request("a", prompt(40), 10)) == by_hand
    assert generate(engine, request("a", prompt(40), 10, output=by_hand[:4])) == by_hand
    assert engine.free_blocks == 64


def test_many_at_once_are_what_each_is_alone_and_come_back_in_order(make_engine: EngineFactory) -> None:
    engine = make_engine(pool_blocks=12)  # two or three at a time
    requests = [request(f"r{i}", prompt(30 + 20 * i), 10 - i) for i in range(6)]
    done: list[int] = []
    together = generate_all(engine, requests, done.append)
    assert together == [generate(engine, one) for one in requests]
    assert done == [1, 2, 3, 4, 5, 6]
    assert engine.free_blocks == 12


def test_an_error_is_raised(make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()

    def nonsense(logits: torch.Tensor, *_: object) -> list[Drawn]:
        return [Drawn(NO_TOKEN)] * logits.shape[0]

    monkeypatch.setattr("engine.sampling.sampler.Sampler.sample", staticmethod(nonsense))
    with pytest.raises(RuntimeError, match="not finite"):
        generate(engine, request("a", prompt(40), 10))
