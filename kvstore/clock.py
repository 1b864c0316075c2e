"""Time, injected. Nothing else in the project asks the machine what time it is for a lease or deadline.

Leases and deadlines rest on monotonic seconds; wall-clock time serves only to stamp HTTP responses.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds since an arbitrary start. Never goes back."""
        ...


class MonotonicClock:
    """The machine's own monotonic clock. It counts on while the process is stopped (SIGSTOP)."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves when told to: for tests and the simulator."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("monotonic time does not go back")
        self._now += seconds


def wall_clock_seconds() -> int:
    """Unix time in whole seconds, for the `created` field of HTTP bodies and nothing else."""
    return time.time_ns() // 1_000_000_000
