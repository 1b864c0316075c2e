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


def in_interpreter(*what: str, timeout_s: float) -> dict[str, Any]:
    """A process of its own: triton must be imported with TRITON_INTERPRET set, and another test may have
    imported it without."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", f"tests.engine.attention.{what[0]}", *what[1:]]
    done = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return in_interpreter("in_interpreter", timeout_s=110)


def test_every_case_is_as_close_to_float64_as_it_says(found: dict[str, Any]) -> None:
    assert found["wrong"] == []
    assert found["seen"] == len(SOME)


def test_in_batch_invariant_mode_no_bit_depends_on_company_or_chunks(found: dict[str, Any]) -> None:
    assert found["varying"] == []


def test_copies_and_codes_have_the_bits_of_torch_and_recorded_decoding_is_right() -> None:
    found = in_interpreter("copies_in_interpreter", timeout_s=110)
    assert found["wrong"] == []
    assert found["seen"] == 12


@pytest.mark.slow
@pytest.mark.timeout(3_000)
def test_the_whole_grid() -> None:
    found = in_interpreter("in_interpreter", "--all", timeout_s=3_000)
    assert found["wrong"] == []
    assert found["seen"] == len(ALL)
