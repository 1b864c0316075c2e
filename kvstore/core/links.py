"""Lists of slots that share two columns: what replacement policies keep their order in.

A slot is in one list at a time. Eight bytes a slot instead of an object; every step is O(1), about 0.5 us.
"""

from __future__ import annotations

from array import array
from typing import Final

_END: Final = -1


class Links:
    """The two columns, for as many slots as there are."""

    __slots__ = ("after", "before")

    def __init__(self) -> None:
        self.before = array("i")
        self.after = array("i")

    def grow(self, slots: int) -> None:
        """By so many slots, in no list."""
        ends = array("i", (_END,)) * slots
        self.before.extend(ends)
        self.after.extend(ends)


class SlotList:
    """One list: append, remove from anywhere, look at the head."""

    __slots__ = ("_first", "_last", "_len", "_links")

    def __init__(self, links: Links) -> None:
        self._links = links
        self._first = self._last = _END
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def prepend(self, slot: int) -> None:
        """The slot must be in no list."""
        links, first = self._links, self._first
        links.before[slot], links.after[slot] = _END, first
        if first == _END:
            self._last = slot
        else:
            links.before[first] = slot
        self._first = slot
        self._len += 1

    def append(self, slot: int) -> None:
        """The slot must be in no list."""
        links, last = self._links, self._last
        links.before[slot], links.after[slot] = last, _END
        if last == _END:
            self._first = slot
        else:
            links.after[last] = slot
        self._last = slot
        self._len += 1

    def remove(self, slot: int) -> None:
        """The slot must be in this list."""
        links = self._links
        before, after = links.before[slot], links.after[slot]
        if before == _END:
            self._first = after
        else:
            links.after[before] = after
        if after == _END:
            self._last = before
        else:
            links.before[after] = before
        self._len -= 1

    def first(self) -> int | None:
        return None if self._first == _END else self._first
