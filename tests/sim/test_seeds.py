"""Promise: whatever goes wrong between clients and shards, every promise of the store holds (world.py).

pytest tests/sim                                 all seeds, and what they met
python -m tests.sim.test_seeds 17                one seed again, and what it met or its traceback
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import structlog

from tests.house.sources import REPO
from tests.sim.tiers import DISK_FAULTS, DISK_STEPS
from tests.sim.world import STEPS, Report, run_seed

SEEDS = 1000
PROCESSES = 2
FAULTS = ("lost request", "lost answer", "twice", "late", "crash")


def silence() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """A world that goes wrong on purpose has much to say."""
    silence()
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(600)
def test_every_seed_keeps_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    apart = multiprocessing.get_context("spawn")  # a seed is the same history in any process
    with ProcessPoolExecutor(PROCESSES, mp_context=apart, initializer=silence) as pool:
        reports = list(pool.map(run_seed, range(SEEDS), chunksize=20))
    met: Counter[tuple[str, str]] = Counter()
    for report in reports:
        met.update(report.faults)
    with capsys.disabled():
        print(summary(reports, met))
    unmet = {(fault, step) for fault in FAULTS for step in STEPS if not met[fault, step]}
    unmet |= {(fault, step) for fault in DISK_FAULTS for step in DISK_STEPS if not met[fault, step]}
    unmet.discard(("failed", "recover"))  # a shard that cannot read what survived does not start
    assert not unmet, f"faults that no seed met: {sorted(unmet)}"
    assert met["pause", "host"]
    assert met["abandoned", "read"]


def test_a_seed_is_the_same_history_every_time() -> None:
    """Also in another process: neither the addresses of objects nor the order of sets is part of it."""
    seeds = ["3", "11", "42"]
    for seed in seeds:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        again = subprocess.run(
            [sys.executable, "-m", "tests.sim.test_seeds", *seeds],
            env=environment, cwd=REPO, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert again.stdout.splitlines() == [str(run_seed(int(seed))) for seed in seeds]


def summary(reports: list[Report], met: Counter[tuple[str, str]]) -> str:
    """Operations a seed, and how often each fault met each call."""

    def total(of: str) -> int:
        return sum(getattr(report, of) for report in reports)

    operations: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for report in reports:
        operations.update(report.ops)
        reasons.update(report.reasons)
    lines = [
        "",
        f"{len(reports)} seeds: {operations.total() / len(reports):.0f} operations each, "
        f"{total('blocks_matched')} blocks matched, {total('blocks_read')} read and checked, "
        f"{total('register_ops')} reads and writes of registers linearized, "
        f"{sum(report.virtual_s for report in reports) / 3600:.0f} virtual hours; "
        f"{met['pause', 'host']} pauses, {met['crash', 'host']} crashes",
        "operations: " + ", ".join(f"{what} {times}" for what, times in sorted(operations.items())),
        "what came of it: " + ", ".join(f"{what} {times}" for what, times in sorted(reasons.items())),
        "".join(["met".ljust(14), *(step.rjust(9) for step in STEPS)]),
    ]
    for fault in ("calls", *FAULTS):
        lines.append("".join([fault.ljust(14), *(str(met[fault, step]).rjust(9) for step in STEPS)]))
    moves: Counter[str] = Counter()
    for report in reports:
        moves.update(report.moves)
    lines.append("moves: " + ", ".join(f"{what} {times}" for what, times in sorted(moves.items())))
    lines.append("".join(["on the disk".ljust(14), *(step.rjust(9) for step in DISK_STEPS)]))
    for fault in ("done", *DISK_FAULTS):
        lines.append("".join([fault.ljust(14), *(str(met[fault, step]).rjust(9) for step in DISK_STEPS)]))
    return "\n".join(lines)


if __name__ == "__main__":
    silence()
    for number in sys.argv[1:]:
        print(run_seed(int(number)))
