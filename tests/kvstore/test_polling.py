"""gRPC polls where one of our own processes asks for it first, and nobody else hears of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.polling import VARIABLE, _is_tried

REPO = Path(__file__).parents[2]
SAY = f"import os; print(kvstore.polling.ACTIVE, 'grpc' in sys.modules, os.environ.get({VARIABLE!r}))"


@pytest.mark.parametrize(
    ("code", "environment", "says"),
    [
        ("import sys, kvstore.polling;", {}, "True True None"),
        ("import sys, grpc, kvstore.polling;", {}, "False True None"),
        (
            "import sys, kvstore.polling;",
            {VARIABLE: "tcp_frame_size_tuning"},
            "False False tcp_frame_size_tuning",
        ),
        ("import sys, kvstore.actor, kvstore.polling;", {}, "True True None"),
    ],
    ids=["first", "after grpc", "the user's word", "a shard's process"],
)
def test_it_is_told_once_and_taken_back(code: str, environment: dict[str, str], says: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code + SAY],
        env=inherited | {"PYTHONPATH": str(REPO)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == says
    assert "experiment" not in done.stderr, "gRPC knows the names"


def test_only_with_a_grpcio_that_was_tried() -> None:
    versions = ["1.62.0", "1.71.2", "1.85.1", "1.86.0", "2.0.0", "1.86.0rc1", "x.y", "1"]
    assert [_is_tried(version) for version in versions] == [False, True, True, *[False] * 5]
