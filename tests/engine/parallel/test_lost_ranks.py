"""Promise: a rank that ends or hangs is a stated error within a bounded time, and no process is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RanksLost
from engine.parallel import processes, runner
from engine.parallel.processes import RankStart
from kvstore.errors import ConfigError
from tests.engine.conftest import prompt, request, run
from tests.engine.parallel.conftest import WAIT_S, is_running, load, wait_until_gone
from tests.tiny_model import make_tiny_model


def pids_of(engine: Engine) -> list[int]:
    assert engine.ranks is not None
    return engine.ranks.pids


def test_a_killed_rank_ends_the_step_and_all_that_come(tiny_folder: Path) -> None:
    engine = load(tiny_folder)
    (pid,) = pids_of(engine)
    engine.admit(request("a", prompt(40), 50))
    engine.step()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RanksLost, match=rf"rank 1 \(pid {pid}\) was ended by SIGKILL.*Start the engine"):
        run(engine)
    with pytest.raises(RanksLost, match="SIGKILL"):
        engine.step()
    assert engine.ranks is not None
    with pytest.raises(RanksLost, match="SIGKILL"):
        engine.ranks.check()
    assert not is_running(pid)


def test_a_rank_that_hangs_is_given_up_and_killed(tiny_folder: Path) -> None:
    engine = load(tiny_folder, rank_timeout_s=1.0)
    (pid,) = pids_of(engine)
    engine.admit(request("a", prompt(40), 50))
    engine.step()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RanksLost, match="cannot go on"):
        run(engine)
    assert not is_running(pid)


def test_a_rank_that_cannot_load_is_the_reason_of_no_engine(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(rank: int, folder: str, *rest: Any) -> RankStart:
        return RankStart(rank, f"{folder}-missing", *rest)

    monkeypatch.setattr(runner, "RankStart", elsewhere)
    monkeypatch.setattr(processes, "_ENDED_S", 20.0)  # its exit code is known by then, and says less
    with pytest.raises(RanksLost, match=r"rank 1 .*failed: there is no model folder"):
        load(tiny_folder)


def test_ranks_end_with_an_engine_that_nobody_closed(tiny_folder: Path) -> None:
    engine = load(tiny_folder)
    (pid,) = pids_of(engine)
    del engine
    gc.collect()
    wait_until_gone(pid)


STEPS_ON = """
import sys
from pathlib import Path
from tests.engine.conftest import prompt, request
from tests.engine.parallel.conftest import load
engine = load(Path(sys.argv[1]))
engine.admit(request("a", prompt(8), 400))
print(*engine.ranks.pids, flush=True)
while engine.has_work():
    engine.step()
sys.stdin.read()
"""


def test_ranks_end_with_an_engine_that_is_killed(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", STEPS_ON, str(tiny_folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert [is_running(pid) for pid in pids] == [True]
        process.kill()
        process.wait(WAIT_S)
    for pid in pids:
        wait_until_gone(pid)


# What is refused


def test_ranks_are_of_cpus() -> None:
    assert EngineConfig(tensor_parallel=2, device="cpu")
    with pytest.raises(ValueError, match="for CPUs"):
        EngineConfig(tensor_parallel=2, device="cuda:0")


@pytest.mark.parametrize(("ranks", "heads"), [(2, {"num_key_value_heads": 1}), (4, {}), (3, {})])
def test_heads_that_cannot_be_dealt_out_are_refused(
    ranks: int, heads: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="divisor"):
        load(make_tiny_model(tmp_path, **heads), ranks=ranks)
