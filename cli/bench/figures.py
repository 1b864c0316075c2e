"""Figures: what one measurement gave, and what many together say."""

from __future__ import annotations

import resource
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

GIB: Final = 1 << 30
GB: Final = 1_000_000_000


def cpu_s() -> float:
    """CPU seconds this process has used, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        listed = sorted(values)
        return cls(statistics.median(listed), listed[0], listed[-1])

    def __format__(self, spec: str) -> str:
        """ "1.25 (1.10 to 1.31)": each number by `spec`, of which a width is the median's alone."""
        least, most = (format(value, spec).strip() for value in (self.least, self.most))
        return f"{self.median:{spec}} ({least} to {most})"


@dataclass(frozen=True, slots=True)
class Moved:
    """Payload bytes that were moved, how long it took, and CPU of all processes that took part."""

    nbytes: int
    wall_s: float
    cpu_s: float

    @property
    def gib_s(self) -> float:
        return self.nbytes / GIB / self.wall_s

    @property
    def gb_s(self) -> float:
        return self.nbytes / GB / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (self.nbytes / GB)


Row = tuple[str, str, int]  # what ("read", "write", BYTES_ALONE), by whom, bytes of a block
BYTES_ALONE: Final = "bytes alone"  # a read without its match and release; CPU is of the whole


class Samples:
    """What the rounds gave, by row."""

    def __init__(self) -> None:
        self._moved: dict[Row, list[Moved]] = defaultdict(list)
        self._values: dict[str, list[float]] = defaultdict(list)

    def clear(self) -> None:
        """Forget the round that warmed up."""
        self._moved.clear()
        self._values.clear()

    def add(self, row: Row, moved: Moved) -> None:
        self._moved[row].append(moved)

    def note(self, name: str, value: float) -> None:
        self._values[name].append(value)

    def rows(self) -> list[Row]:
        return list(self._moved)

    def gib_s(self, row: Row) -> Spread:
        return Spread.of(moved.gib_s for moved in self._moved[row])

    def cpu_s_per_gb(self, row: Row) -> Spread:
        return Spread.of(moved.cpu_s_per_gb for moved in self._moved[row])

    def value(self, name: str) -> Spread:
        return Spread.of(self._values[name])
