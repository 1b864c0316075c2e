"""The GPU's kernel, in Triton's interpreter, moves just the bits that torch moves."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.house.sources import REPO
from tests.kvstore.integrations.vllm.backends import BACKENDS


def test_pages_move_what_the_pool_moves() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kvstore.integrations.vllm.in_interpreter"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == [], found
    assert found["seen"] == 2 * len(BACKENDS)
