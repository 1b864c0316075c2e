"""Engines over the tiny model, requests, and a way to see the logits that tokens were drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling.rows import Drawn, SamplingRow
from engine.sampling.sampler import Sampler
from engine.types import GenerationRequest, SamplingParams, StepResult
from tests.tiny_model import make_tiny_model

EngineFactory = Callable[..., Engine]
Logits = dict[tuple[int, int], torch.Tensor]
"""(the request's seed, position of the token being drawn) -> its logits."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_engine(tiny_folder: Path) -> EngineFactory:
    def make(folder: Path = tiny_folder, **settings: Any) -> Engine:
        defaults = {"pool_blocks": 64, "threads": torch.get_num_threads()}
        return Engine.load(folder, EngineConfig(**(defaults | settings)))

    return make


@pytest.fixture
def seen_logits(monkeypatch: pytest.MonkeyPatch) -> Logits:
    """Filled by every step of every engine while the test runs."""
    seen: Logits = {}
    sample = Sampler.sample

    def record(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
        for values, row in zip(logits, rows, strict=True):
            seen[row.params.seed, len(row.tokens)] = values.clone()
        return sample(logits, rows)

    monkeypatch.setattr(Sampler, "sample", staticmethod(record))
    return seen


@pytest.fixture(autouse=True)
def set_threads() -> Iterator[Callable[[int], None]]:
    """One thread unless a test asks for more: the tiny model gains nothing by them, and where others use the
    machine two threads that wait for each other cost tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    output: Sequence[int] = (),
    attempt: int = 0,
    **sampling: Any,
) -> GenerationRequest:
    """Greedy and deaf to end tokens unless `sampling` says otherwise."""
    wanted = SamplingParams(max_tokens, **({"temperature": 0.0, "ignore_eos": True} | sampling))
    return GenerationRequest(name, attempt, tuple(prompt), wanted, tuple(output))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids of the tiny model, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 259, (length,), generator=generator).tolist())


def run(engine: Engine, steps_max: int = 5000) -> list[StepResult]:
    """Step until there is no work."""
    results: list[StepResult] = []
    while engine.has_work():
        assert len(results) < steps_max, "the engine does not come to an end"
        results.append(engine.step())
    return results


def tokens_of(results: Sequence[StepResult], name: str) -> list[int]:
    return [event.token_id for result in results for event in result.events if event.request_id == name]
