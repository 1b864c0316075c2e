"""Engines and stores that several tests share; and no test installs vLLM: without it, it is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cli.bench.peers.vllm_environment import vllm_folder, what_lacks
from tests.tiny_model import make_tiny_model
from tests.vllm.engines import VllmEngine, engine

why_not = cache(what_lacks)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures, which start engines."""
    if item.get_closest_marker("vllm") and (reason := why_not(vllm_folder())):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of the width that vLLM's CPU attention takes."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), hidden_size=128, head_dim=32)


@pytest.fixture(scope="session")
def plain(tiny: Path) -> Iterator[VllmEngine]:
    """vLLM alone, without its prefix cache: what all answers are compared with."""
    with engine(tiny, enable_prefix_caching=False) as started:
        yield started
