"""What a worker's half counts and times between two reports, from vLLM's thread and the loop's."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from kvstore.integrations.vllm.plans import StepReport

__all__ = ["Tallies"]

_KEPT_MAX: Final = 4096  # of each list, should nobody ask for a report


class Tallies:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._seconds: dict[str, list[float]] = {}
        self._stored: list[tuple[str, int, int]] = []
        self._loaded: set[str] = set()
        self._failed: set[int] = set()
        self._has_loaded = threading.Event()

    def count(self, name: str, by: int = 1) -> None:
        if by:
            with self._lock:
                self._counters[name] += by

    def took(self, what: str, seconds: float) -> None:
        with self._lock:
            times = self._seconds.setdefault(what, [])
            if len(times) < _KEPT_MAX:
                times.append(seconds)

    def stored(self, request_id: str, begin: int, end: int) -> None:
        with self._lock:
            if len(self._stored) < _KEPT_MAX:
                self._stored.append((request_id, begin, end))

    def loaded(self, request_id: str, failed: set[int]) -> None:
        """Both at once: vLLM must hear of failed blocks no later than of the load's end."""
        with self._lock:
            self._loaded.add(request_id)
            self._failed |= failed
        self._has_loaded.set()

    def wait_for_a_load(self, seconds: float) -> None:
        """Until one has ended since the last report."""
        self._has_loaded.wait(seconds)

    def report(self) -> StepReport:
        """Everything since the last one."""
        with self._lock:
            report = StepReport(self._loaded, self._failed, dict(self._counters), self._seconds, self._stored)
            self._loaded, self._failed, self._seconds, self._stored = set(), set(), {}, []
            self._counters.clear()
            self._has_loaded.clear()
        return report
