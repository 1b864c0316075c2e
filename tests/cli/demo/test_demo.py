"""The demo, run whole as a first user runs it: what it claims, in one JSON document, and no trace of it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import psutil
import pytest

from cli.demo.conversation import QUESTIONS
from tests.serving import below, command, folders

pytestmark = [pytest.mark.serving, pytest.mark.model, pytest.mark.timeout(300)]

CACHED_MIN = 0.9  # of a later turn's prompt: all of it but the question is in the store


def test_every_claim_of_the_demo_holds_and_it_leaves_nothing() -> None:
    demo = subprocess.Popen(
        command("demo", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert demo.stdout is not None
    assert demo.stderr is not None
    processes: list[psutil.Process] = []
    said: list[str] = []
    try:
        for line in demo.stderr:
            said.append(line)
            processes = processes or (below(demo.pid) if line.startswith("holding") else [])
        out = demo.stdout.read()
        code = demo.wait(timeout=30)
    finally:
        demo.terminate()
        demo.communicate()
    assert out.count("\n") == 1, "".join(said)
    assert_holds(json.loads(out))
    # Speed is the demo's own claim: where others keep the machine busy it may fail, and nothing else may.
    failures = [line for line in said if line.startswith("FAILED: ")]
    assert [line for line in failures if "TTFT" not in line] == []
    assert code == (1 if failures else 0), "".join(said)
    assert len(processes) > 5
    assert [process for process in processes if process.is_running()] == []
    assert folders(demo.pid) == []


def assert_holds(document: dict[str, Any]) -> None:
    turns = document.pop("turns")
    assert len(turns) == len(QUESTIONS)
    for turn in turns:
        assert turn.keys() == {"prompt_tokens", "cached_tokens", "ttft_ms", "output_tokens"}
        assert turn["output_tokens"] > 0
        assert turn["ttft_ms"] > 0
    for turn in turns[1:]:
        assert turn["cached_tokens"] >= CACHED_MIN * turn["prompt_tokens"]
    assert document.pop("ttft_cold_ms") == turns[0]["ttft_ms"]
    assert document.pop("ttft_warm_ms") == max(turn["ttft_ms"] for turn in turns[1:])
    assert document.pop("verified_blocks") > 0
    assert document.pop("rejected")["checksum"] >= 1
    assert document == {"equal_to_monolithic": True, "unchanged_after_flip": True, "ownerless_bytes": 0}
