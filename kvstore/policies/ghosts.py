"""What is remembered of versions that were given up: enough to know one again when it comes back.

Two tables in packed columns. The newer one takes entries until it is three quarters full; then it becomes
the older one, whose forerunner is forgotten, and a fresh one is made. So between one and two tables' worth is
remembered, the latest of it, and nothing is ever moved. In a table an entry lies in one of the four places
of its bucket, and the oldest of a full bucket makes room.

Fifteen bytes an entry, O(1) a step. It may forget early and, once in about 2^30 look-ups, take one for
another: a hint, never more.
"""

from __future__ import annotations

from array import array
from typing import Final, NamedTuple

_WAYS: Final = 4
_ENTRIES_MIN, _ENTRIES_MAX = 1_024, 1 << 20
_TAG_BITS: Final = 32
_MIX: Final = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio: spreads fingerprints that lie close together
_MIXED_BITS: Final = (1 << 64) - 1


class Ghost(NamedTuple):
    place: int  # where its policy had it when it went, 1 to 255
    uses: int  # until then, up to 255
    used_s: float  # the last of them


class _Table:
    __slots__ = ("_buckets", "_counts", "_places", "_tags", "_used_s", "length")

    def __init__(self, entries: int) -> None:
        self._buckets = entries // _WAYS
        self._tags, self._used_s = array("I", bytes(4 * entries)), array("d", bytes(8 * entries))
        self._places, self._counts = bytearray(entries), bytearray(entries)
        self.length = 0

    @property
    def is_full(self) -> bool:
        return 4 * self.length >= 3 * self._buckets * _WAYS

    def add(self, fingerprint: int, ghost: Ghost) -> None:
        first = fingerprint % self._buckets * _WAYS
        ways = range(first, first + _WAYS)
        at = next((i for i in ways if not self._places[i]), None)
        if at is None:
            at = min(ways, key=self._used_s.__getitem__)
        else:
            self.length += 1
        self._tags[at] = fingerprint >> _TAG_BITS
        self._places[at], self._counts[at], self._used_s[at] = ghost

    def take(self, fingerprint: int) -> Ghost | None:
        first, tag = fingerprint % self._buckets * _WAYS, fingerprint >> _TAG_BITS
        for i in range(first, first + _WAYS):
            if self._places[i] and self._tags[i] == tag:
                ghost = Ghost(self._places[i], self._counts[i], self._used_s[i])
                self._places[i] = 0
                self.length -= 1
                return ghost
        return None


class Ghosts:
    def __init__(self) -> None:
        self._newer, self._older = _Table(_ENTRIES_MIN), _Table(_ENTRIES_MIN)

    def __len__(self) -> int:
        return self._newer.length + self._older.length

    def add(self, fingerprint: int, ghost: Ghost, at_least: int) -> None:
        """Remember about `at_least` of them, within bounds. It must not be remembered yet."""
        fingerprint = fingerprint * _MIX & _MIXED_BITS
        if self._newer.is_full:
            wanted = min(max(2 * at_least, _ENTRIES_MIN), _ENTRIES_MAX)
            self._older, self._newer = self._newer, _Table(1 << (wanted - 1).bit_length())
        self._newer.add(fingerprint, ghost)

    def take(self, fingerprint: int) -> Ghost | None:
        """What is remembered of it; from now on nothing is."""
        fingerprint = fingerprint * _MIX & _MIXED_BITS
        return self._newer.take(fingerprint) or self._older.take(fingerprint)
