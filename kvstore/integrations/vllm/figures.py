"""What the connector counts and times, from two threads, until vLLM asks for it: plain values that travel.

{"counters": {"hits": 3, "miss:absent": 1}, "seconds": {"lookup": [count, sum, longest]}}
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["Figures", "empty", "is_empty", "merged", "reduced"]

NAMES_MAX: Final = 256
"""Counters of one interval: names come from closed lists, so this is a guard alone."""


class Figures:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data = empty()

    def count(self, name: str, by: int = 1) -> None:
        with self._lock:
            counters = self._data["counters"]
            if name in counters or len(counters) < NAMES_MAX:
                counters[name] = counters.get(name, 0) + by

    def took(self, what: str, seconds: float) -> None:
        with self._lock:
            _add(self._data["seconds"], what, [1, seconds, seconds])

    def take(self) -> dict[str, Any] | None:
        """What gathered since it was last taken. None: nothing."""
        with self._lock:
            if is_empty(self._data):
                return None
            taken, self._data = self._data, empty()
            return taken


def empty() -> dict[str, Any]:
    return {"counters": {}, "seconds": {}}


def is_empty(data: Mapping[str, Any]) -> bool:
    return not data.get("counters") and not data.get("seconds")


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    counters = Counter(one.get("counters", {}))
    counters.update(other.get("counters", {}))
    seconds = {what: list(spent) for what, spent in one.get("seconds", {}).items()}
    for what, spent in other.get("seconds", {}).items():
        _add(seconds, what, spent)
    return {"counters": dict(counters), "seconds": seconds}


def reduced(data: Mapping[str, Any]) -> dict[str, int | float]:
    """One line of a log: counters, and of each time its mean and its longest, in milliseconds."""
    line: dict[str, int | float] = dict(sorted(data.get("counters", {}).items()))
    for what, (count, total, longest) in sorted(data.get("seconds", {}).items()):
        line[f"{what}_ms_mean"] = round(1e3 * total / count, 3) if count else 0.0
        line[f"{what}_ms_max"] = round(1e3 * longest, 3)
    return line


def _add(seconds: dict[str, Any], what: str, spent: list[float]) -> None:
    count, total, longest = seconds.get(what, (0, 0.0, 0.0))
    seconds[what] = [count + spent[0], total + spent[1], max(longest, spent[2])]
