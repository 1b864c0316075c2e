"""Promise: what a graph records of Triton's attention is right for every context, whoever decodes by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.house.sources import REPO


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.engine.attention.static_in_interpreter"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_one_plan_serves_all_contexts(found: dict[str, Any]) -> None:
    assert found["different"] == []


def test_an_engine_over_it_says_the_same(found: dict[str, Any]) -> None:
    assert found["triton"] == found["torch"]
    assert [len(answer) for answer in found["triton"]] == [4, 5, 6]
