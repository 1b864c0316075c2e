"""Fixtures of more than one room's tests; and no test downloads a model: without it, it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model_cache import ModelCache, cache_root
from engine.registry import DEFAULT_MODEL
from tests.tiny_model import make_tiny_model


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a test marked `model`: one of them may start a service that would fetch it."""
    cache = ModelCache(cache_root())
    if item.get_closest_marker("model") and not cache.is_complete(DEFAULT_MODEL):
        pytest.skip(f"{DEFAULT_MODEL} is not in {cache.root}: run `kvstrata model pull {DEFAULT_MODEL}`")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))
