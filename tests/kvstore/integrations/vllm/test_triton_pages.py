"""The GPU's kernel, in Triton's interpreter, moves just the bits that torch moves."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Self

import numpy as np
import pytest
import torch

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


class Host:
    """Stands for offsets in host memory: what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def pin_memory(self) -> Self:
        self.asked.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        self.asked.append((device.type, non_blocking))
        return self


def test_offsets_go_to_a_gpu_without_waiting_for_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of pageable memory a copy would wait for the whole forward pass before it."""
    pytest.importorskip("triton")
    from kvstore.integrations.vllm import triton_pages

    host, pages = Host(), object.__new__(triton_pages.Pages)
    monkeypatch.setattr(torch, "from_numpy", lambda offsets: host)
    pages._device = torch.device("cuda")
    pages._there(np.arange(3))
    assert host.asked == ["pinned", ("cuda", True)]
