"""Promise: whatever goes wrong between clients and shards, no wrong byte, no broken pin, nothing left behind.

pytest tests/sim                                 all seeds, and what they met
python -m tests.sim.test_seeds 17                one seed again, with its traceback
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import structlog

from tests.sim.world import STEPS, Report, run_seed

SEEDS = 1000
FAULTS = ("lost request", "lost answer", "twice", "late", "crash")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """A world that goes wrong on purpose has much to say."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(600)
def test_every_seed_keeps_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    reports = [run_seed(seed) for seed in range(SEEDS)]
    met: Counter[tuple[str, str]] = Counter()
    for report in reports:
        met.update(report.faults)
    with capsys.disabled():
        print(summary(reports, met))
    unmet = {(fault, step) for fault in FAULTS for step in STEPS if not met[fault, step]}
    assert not unmet, f"faults that no seed met: {sorted(unmet)}"
    assert met["pause", "host"]
    assert met["abandoned", "read"]


def test_a_seed_is_the_same_history_every_time() -> None:
    for seed in (3, 11, 42):
        assert run_seed(seed) == run_seed(seed)


def summary(reports: list[Report], met: Counter[tuple[str, str]]) -> str:
    """Operations a seed, and how often each fault met each call."""
    operations = sum(report.ops.total() for report in reports)
    read = sum(report.blocks_read for report in reports)
    virtual = sum(report.virtual_s for report in reports)
    lines = [
        "",
        f"{len(reports)} seeds: {operations / len(reports):.0f} operations each, {read} blocks read and "
        f"checked, {virtual / 3600:.0f} virtual hours; {met['pause', 'host']} pauses, "
        f"{met['crash', 'host']} crashes",
        "".join(["met".ljust(14), *(step.rjust(9) for step in STEPS)]),
    ]
    for fault in ("calls", *FAULTS):
        lines.append("".join([fault.ljust(14), *(str(met[fault, step]).rjust(9) for step in STEPS)]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(run_seed(int(sys.argv[1])))
