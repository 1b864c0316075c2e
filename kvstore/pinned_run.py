"""The blocks of a match as values that are made when somebody looks at one.

Most matches of a long prompt are only counted: the columns they came in are enough for that, and 128 small
objects a match are most of its way in Python otherwise (benchmarks/latency.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from kvstore.nouns import PinnedBlock


class PinnedRun(Sequence[PinnedBlock]):
    """As good as the tuple it becomes: equal to it, and so are its slices."""

    __slots__ = ("_blocks", "_length", "_make")

    def __init__(self, length: int, make: Callable[[], list[PinnedBlock]]) -> None:
        """`make` must give `length` blocks, whenever it is called; it is called once at most."""
        self._length = length
        self._make = make
        self._blocks: tuple[PinnedBlock, ...] | None = None

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> PinnedBlock: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[PinnedBlock, ...]: ...

    def __getitem__(self, at: int | slice) -> PinnedBlock | tuple[PinnedBlock, ...]:
        if self._blocks is None:
            self._blocks = tuple(self._make())
        return self._blocks[at]

    def __eq__(self, other: object) -> bool:
        return self[:] == (other[:] if isinstance(other, PinnedRun) else other)

    def __hash__(self) -> int:
        return hash(self[:])

    def __repr__(self) -> str:
        return repr(self[:])
