"""What is known of each version's uses, in packed columns: all a policy may go by.

A *use* is versions let go of together, by one release or one commit: a request's chain, or as much of it as
lies here. Of each version stands here when it was used last, how often, how long the chain was, which turn
of its session that was, and the slot of the version it was built on.

*Turns.* A use goes on from an earlier one when the deepest block that was there before was the last, or the
last but one, of the chain it was let go with (a chain's last block may be cut short by the request's end,
and then nothing is built on it). The use is then one turn further; otherwise it begins a session. A use
that adds nothing, or only adds to a chain that is not part of it, is of the turn it found.

Costs 20 bytes a version and about 0.3 us a version and use. Nothing here can fail; all saturates.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kvstore.core.versions import NONE, Versions
from kvstore.nouns import KEY_NBYTES

_COUNT_MAX: Final = 255
_SPAN_MAX: Final = 65_535
_GENERATION_BITS: Final = (1 << 32) - 1
FINGERPRINT_NBYTES: Final = 8


class Use(NamedTuple):
    """Versions of one tenant and epoch, let go of together."""

    slots: Sequence[int]  # tail first
    now: float  # seconds, on the core's own time, which leaves out its pauses
    span: int  # blocks of the chain, from its root to the deepest of these
    turn: int  # of its session, from 1
    base: int  # the deepest of the slots that was used before; NONE: all are new


class Uses:
    __slots__ = (
        "_parent_generations", "_versions", "counts", "observers", "parents", "spans", "turns", "used_s",
    )  # fmt: skip

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self.observers: list[Callable[[Use], None]] = []  # told of each use; the columns are of before it
        self.counts = bytearray()  # how often, 255 and more are 255
        self.turns = bytearray()
        self.spans = array("H")
        self.used_s = array("d")
        self.parents = array("i")
        self._parent_generations = array("I")

    @property
    def chain_indexes(self) -> Sequence[int]:
        return self._versions.chain_indexes

    @property
    def nbytes(self) -> Sequence[int]:
        return self._versions.nbytes

    def fingerprint(self, slot: int) -> int:
        """The last eight bytes of its key: enough to know it again when it comes back."""
        end = (slot + 1) * KEY_NBYTES
        return int.from_bytes(self._versions.keys[end - FINGERPRINT_NBYTES : end], "big")

    def born(self, slot: int, parent: int, now: float) -> None:
        """The slot holds a new version, built on the one in `parent` (NONE: that is not here). Until it is
        used, what the slot's former version left behind must not speak for it."""
        missing = slot + 1 - len(self.counts)
        if missing > 0:
            for flags in (self.counts, self.turns):
                flags.extend(bytes(missing))
            for column in (self.spans, self.used_s, self.parents, self._parent_generations):
                column.frombytes(bytes(missing * column.itemsize))
        self.counts[slot] = self.turns[slot] = self.spans[slot] = 0
        self.used_s[slot] = now
        self.parents[slot] = parent
        if parent != NONE:
            self._parent_generations[slot] = self._versions.generations[parent] & _GENERATION_BITS

    def parent(self, slot: int) -> int:
        """The slot of the version this one was built on; NONE when that is gone."""
        parent = self.parents[slot]
        if parent == NONE:
            return NONE
        same = self._parent_generations[slot] == self._versions.generations[parent] & _GENERATION_BITS
        return parent if same else NONE

    def known_again(self, slot: int, count: int) -> None:
        """The slot holds a key that was here before, and had been used so often."""
        self.counts[slot] = count

    def of(self, slots: Sequence[int], now: float) -> Use:
        """The use of these slots, sorted tail first; there is at least one."""
        counts, indexes = self.counts, self._versions.chain_indexes
        base = next((slot for slot in slots if counts[slot]), NONE)
        if base == NONE:
            parent = self.parent(slots[-1])
            turn = self.turns[parent] if parent != NONE else 1
        elif base == slots[0]:
            turn = self.turns[base]
        else:
            turn = self.turns[base] + 1 if indexes[base] + 2 >= self.spans[base] else 1
        span = min(indexes[slots[0]] + 1, _SPAN_MAX)
        return Use(slots, now, span, min(max(1, turn), _COUNT_MAX), base)

    def last(self, slot: int) -> Use:
        """The slot's last use, as far as it was that slot's."""
        span = max(self.spans[slot], self._versions.chain_indexes[slot] + 1)
        base = slot if self.counts[slot] else NONE
        return Use((slot,), self.used_s[slot], min(span, _SPAN_MAX), max(1, self.turns[slot]), base)

    def record(self, use: Use) -> None:
        """After the policies have seen it."""
        for observe in self.observers:
            observe(use)
        counts, turns, spans, used_s = self.counts, self.turns, self.spans, self.used_s
        now, span, turn = use.now, use.span, use.turn
        for slot in use.slots:
            if counts[slot] < _COUNT_MAX:
                counts[slot] += 1
            turns[slot], spans[slot], used_s[slot] = turn, span, now
