"""A store of its own for each test of the connector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.integrations.vllm import file_times
from tests.kvstore.integrations.vllm.store import LocalStore, local_store


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with local_store() as opened:
        yield opened


@pytest.fixture(autouse=True)
def files_are_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test writes its files itself: vLLM finds them there, unless the test is of files that change."""
    monkeypatch.setattr(file_times, "process_started_s", lambda: float(1 << 40))
