"""Versions given up last: those somebody is about to ask for, and those that wait to be written below.

To a replacement policy what an announced request needs looks like what nobody wants: it was used long ago,
most of all when it just came up from below. So who is kept and comes up as the victim is lifted out of its
queue like one that others are built on (eviction.py), and put back when its reader let go of it or its
time ended. Kept is a share of the host at most; what is beyond goes when its turn comes, and is counted by
whom it was to be kept for. What waits for its way down lies nowhere else, while others have a copy below
and lose nothing: it is given up last too, its queue being bounded. O(1) a version.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from kvstore.core.versions import Versions


class _Entry(NamedTuple):
    until: float
    nbytes: int


class Kept:
    """Contains the slots."""

    def __init__(self, versions: Versions, nbytes_max: int) -> None:
        self._versions = versions
        self._nbytes = 0
        self._nbytes_max = nbytes_max
        self._entries: dict[int, _Entry] = {}
        self.leaving: Container[int] = ()  # what waits to be written below

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, slot: object) -> bool:
        return slot in self._entries or slot in self.leaving

    def keep(self, slot: int, until: float) -> bool:
        """False when no more may be kept."""
        entry = self._entries.get(slot)
        if entry is not None and entry.until >= until:
            return True
        if entry is not None:
            self._forget(slot)
        nbytes = self._versions.nbytes[slot]
        if self._nbytes + nbytes > self._nbytes_max:
            return False
        self._entries[slot] = _Entry(until, nbytes)
        self._nbytes += nbytes
        return True

    def asked_for(self, slots: Iterable[int]) -> None:
        """Their reader has them now: from here on its pin keeps them."""
        for slot in slots:
            if slot in self._entries:
                self._forget(slot)

    def past(self, now: float, looked_at_max: int) -> Iterator[int]:
        """Those whose time is over, of the first so many; whoever was looked at comes last next time."""
        for slot in list(islice(self._entries, looked_at_max)):
            entry = self._entries.pop(slot)
            if entry.until > now:
                self._entries[slot] = entry
            else:
                self._nbytes -= entry.nbytes
                yield slot

    def _forget(self, slot: int) -> None:
        self._nbytes -= self._entries.pop(slot).nbytes
