"""One engine in a process, and the same over two ranks: started once for the tests of a file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RanksLost

BLOCK_TOKENS = 8
WAIT_S = 30.0
"""The bound of waits: far beyond what any needs."""


def load(folder: Path, ranks: int = 2, **settings: Any) -> Engine:
    defaults = {"block_tokens": BLOCK_TOKENS, "pool_blocks": 64, "threads": 1, "running_max": 16}
    config = EngineConfig(**(defaults | {"tensor_parallel": ranks} | settings))
    return Engine.load(folder, config)


def close(engine: Engine) -> None:
    assert engine.ranks is not None
    engine.ranks.close()


@pytest.fixture(scope="module")
def two(tiny_folder: Path) -> Iterator[Engine]:
    """Between tests nothing is in it."""
    threads = torch.get_num_threads()
    engine = load(tiny_folder)
    yield engine
    assert engine.ranks is not None
    (pid,) = engine.ranks.pids
    close(engine)
    close(engine)
    assert not is_running(pid)
    with pytest.raises(RanksLost, match="closed"):
        engine.pool.read_block(0)
    torch.set_num_threads(threads)


@pytest.fixture
def one(tiny_folder: Path) -> Engine:
    return load(tiny_folder, ranks=1)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "two" in request.fixturenames:
        engine: Engine = request.getfixturevalue("two")
        assert engine.running == 0
        engine.check_integrity()


def wait_until_gone(pid: int) -> None:
    """A process that nobody waits for is gone when it is a zombie, too."""
    deadline = time.monotonic() + WAIT_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        os.sched_yield()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
