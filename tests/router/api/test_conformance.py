"""Promise of the OpenAI surface: the official client works against the routes, errors included."""

from __future__ import annotations

import pytest

from tests.router.conformance import Conformance
from tests.router.conftest import LiveServer
from tests.router.fakes import MODEL


class TestScriptedService(Conformance):
    @pytest.fixture
    def url(self, live: LiveServer) -> str:
        return live.url

    @pytest.fixture
    def model(self) -> str:
        return MODEL
