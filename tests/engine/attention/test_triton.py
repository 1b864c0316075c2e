"""Promise: Triton's attention is float64's within stated tolerances, over all shapes, windows and pools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.engine.attention.cases import ALL, SOME
from tests.house.sources import REPO


def in_interpreter(*options: str, timeout_s: float) -> dict[str, Any]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.engine.attention.in_interpreter", *options]
    done = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return in_interpreter(timeout_s=300)


def test_every_case_is_as_close_to_float64_as_it_says(found: dict[str, Any]) -> None:
    assert found["wrong"] == []
    assert found["seen"] == len(SOME)


def test_in_batch_invariant_mode_no_bit_depends_on_company_or_chunks(found: dict[str, Any]) -> None:
    assert found["varying"] == []


@pytest.mark.slow
def test_the_whole_grid() -> None:
    found = in_interpreter("--all", timeout_s=3_000)
    assert found["wrong"] == []
    assert found["seen"] == len(ALL)
