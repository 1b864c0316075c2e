"""Import this first in a process of ours: gRPC then polls its sockets in the thread that answers.

gRPC's event engine hands every message from a thread of its own to the one that polls for us; without it a
small message's round trip costs a quarter to a third less (benchmarks/latency.py measures both). The setting
is gRPC's own, read once, when `grpc` is first imported. It is taken back at once: Ray's C++ core, and
processes started from this one, read the same variable.

It does nothing where `grpc` was imported before, where the user has set GRPC_EXPERIMENTS, or with a grpcio
that this was not tried with. A library should not decide this for the process it is in: only our own
processes' entry points (actors, benchmarks) import this module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import Final

VARIABLE: Final = "GRPC_EXPERIMENTS"
POLLING: Final = "-event_engine_client,-event_engine_listener"
_TRIED: Final = ((1, 71), (1, 85))  # first and last grpcio that know these names


def _is_tried(version: str) -> bool:
    first, last = _TRIED
    numbers = version.split(".")[:2]
    return all(n.isdigit() for n in numbers) and first <= tuple(int(n) for n in numbers) <= last


def import_polling_grpc() -> bool:
    """Whether gRPC was told to poll."""
    if "grpc" in sys.modules or VARIABLE in os.environ or not _is_tried(importlib.metadata.version("grpcio")):
        return False
    os.environ[VARIABLE] = POLLING
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ[VARIABLE]
    return True


ACTIVE: Final = import_polling_grpc()
