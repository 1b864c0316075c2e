"""A store of its own for each test of the connector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kvstore.integrations.vllm.store import LocalStore, local_store


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with local_store() as opened:
        yield opened
