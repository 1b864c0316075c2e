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


def run(what: str, *options: str, interpreted: bool, timeout_s: float) -> dict[str, Any]:
    """A process of its own: triton must be imported with TRITON_INTERPRET set or without, and another test
    may have imported it otherwise."""
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-m", f"tests.engine.attention.{what}", *options]
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


pytestmark = pytest.mark.timeout(300)
"""Alone they take 15 s each at most; on a busy machine much longer."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run("in_interpreter", interpreted=True, timeout_s=280)


def test_every_case_is_as_close_to_float64_as_it_says(found: dict[str, Any]) -> None:
    assert found["wrong"] == []
    assert found["seen"] == len(SOME)


def test_in_batch_invariant_mode_no_bit_depends_on_company_or_chunks(found: dict[str, Any]) -> None:
    assert found["varying"] == []


def test_copies_and_codes_have_the_bits_of_torch_and_recorded_decoding_is_right() -> None:
    found = run("copies_in_interpreter", interpreted=True, timeout_s=280)
    assert found["wrong"] == []
    assert found["seen"] == 12


def test_all_kernels_compile_for_hopper_onto_its_tensor_cores() -> None:
    found = run("compiled", interpreted=False, timeout_s=280)
    assert found["decode model"] == found["decode fp8"] == ["mma.sync"]
    assert found["prefill model"] == found["prefill fp8"] == ["wgmma.mma_async"]


@pytest.mark.slow
@pytest.mark.timeout(3_000)
def test_the_whole_grid() -> None:
    found = run("in_interpreter", "--all", interpreted=True, timeout_s=3_000)
    assert found["wrong"] == []
    assert found["seen"] == len(ALL)
