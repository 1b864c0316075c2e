"""No test downloads: those marked `model` are skipped, with the reason, where the default model is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model_cache import cache_root
from tests.conftest import pytest_runtest_setup


def test_a_plain_test_asks_for_no_model(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_CACHE", str(tmp_path))
    pytest_runtest_setup(request.node)


def test_a_test_marked_model_is_skipped_where_it_is_not(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_CACHE", str(tmp_path))
    request.node.add_marker("model")
    with pytest.raises(pytest.skip.Exception, match=f"not in {cache_root()}: run `kvstrata model pull"):
        pytest_runtest_setup(request.node)
