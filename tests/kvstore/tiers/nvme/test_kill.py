"""Promise 4 against a real file system: kill -9 at any moment loses nothing that was acknowledged."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import pytest

from tests.kvstore.tiers.nvme import killed

PATIENCE_S = 30.0


def kill_loop(folder: Path, seed: int, rounds: int) -> None:
    rng = random.Random(seed)
    directories = [str(folder / f"disk-{i}") for i in range(rng.choice((1, 1, 2)))]
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload([killed.__name__])
    for number in range(rounds):
        ours, theirs = spawn.Pipe(duplex=False)
        arguments = (directories, str(folder / "expected"), seed * 1_000 + number, theirs)
        child = spawn.Process(target=killed.work, args=arguments)
        child.start()
        theirs.close()
        try:
            for _ in range(rng.choice((0, 1, 20, 100, 300))):
                assert ours.poll(PATIENCE_S), f"seed {seed}, round {number}: the child stands still"
                said = ours.recv()
                assert said in ("recovered", "step"), f"seed {seed}, round {number}: {said}"
        finally:
            child.kill()
            child.join(PATIENCE_S)
            ours.close()


def test_a_killed_process_loses_nothing_it_was_told(tmp_path: Path) -> None:
    kill_loop(tmp_path, 1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_many_killed_processes_lose_nothing(seed: int, tmp_path: Path) -> None:
    kill_loop(tmp_path, seed, 20)
