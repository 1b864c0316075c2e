"""What a process that computes sets before torch is loaded: how its threads wait, how its memory is kept.

OpenMP's threads spin while they wait for each other. On a machine whose cores are shared (prefill, decode,
shards and router on a laptop) a spinning thread takes the core that the awaited one needs; one that sleeps
at once is woken hundreds of times a step. So they spin for about the gap between two operations, some 20 us,
then sleep. Measured on two cores (docs/devlog.md): a decode step of 4 sequences takes 50 ms so, as with
unbounded spinning, and 66 asleep; with another busy process beside, a prompt of 1,024 tokens 5 s, asleep 4,
spinning 6 to 14.
"""

from __future__ import annotations

import os

from kvstore.memory import keep_freed_buffers

__all__ = ["SPIN_COUNT", "prepare_process"]

SPIN_COUNT = "10000"
"""Turns of libgomp's waiting loop."""


def prepare_process() -> None:
    """Idempotent. Too late for the threads once torch is imported; what the user chose for waiting stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # of runtimes that count no turns
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets 1 for actors without a CPU; EngineConfig decides
    keep_freed_buffers()
