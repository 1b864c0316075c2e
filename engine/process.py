"""What a process that computes sets before torch is loaded: how its threads wait, how its memory is kept.

OpenMP's threads spin while they wait for each other. On a machine whose cores are shared (prefill, decode,
shards and router on a laptop) a spinning thread takes the core that the awaited one needs; one that sleeps
is woken hundreds of times a step. Measured on two cores (docs/devlog.md), a decode step:

                                  asleep      for some 20 us    without end
    4 sequences, alone             66 ms            50 ms          50 ms
    16 sequences, other work      157 ms           471 ms       1,577 ms
"""

from __future__ import annotations

import os
from typing import Literal

from kvstore.memory import keep_freed_buffers

__all__ = ["SPIN_COUNT", "prepare_process"]

SPIN_COUNT = "10000"
"""Turns of libgomp's waiting loop: about the gap between two operations."""


def prepare_process(wait_policy: Literal["passive", "active"] = "passive") -> None:
    """`wait_policy` is EngineConfig's. Idempotent. Too late for the threads once torch is imported; what the
    user chose for waiting stays."""
    if wait_policy == "active":
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a spin count outweighs it
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets 1 for actors without a CPU; EngineConfig decides
    keep_freed_buffers()
