"""The Protocols that policies fill. The core owns them: a policy sees what the core knows, no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvstore.core.links import Links


class ReplacementPolicy(Protocol):
    """The order in which slots are given up, of one tenant and one epoch of one model.

    Every slot whose version is live and unpinned is in its policy. One that was pinned since may be there
    too: when it comes up as the victim the core takes it out and asks again, so that pinning, which is in
    the way of every read, touches no policy. Nothing here may fail.
    """

    def insert(self, slot: int) -> None:
        """The slot became evictable, just used. Changes the order. The slot must not be present."""
        ...

    def remove(self, slot: int) -> None:
        """The slot was used again, retired, evicted or found pinned. It must be present."""
        ...

    def victim(self) -> int | None:
        """The slot to give up next; None when there is none. Changes nothing."""
        ...

    def __len__(self) -> int: ...


class AdmissionPolicy(Protocol):
    """Which versions are worth a write to the next tier: most are never used again."""

    def admits(self, slot: int, now: float) -> bool:
        """Asked when the slot is a candidate for demotion: its version is live. Changes nothing."""
        ...


MakePolicy = Callable[[Links], ReplacementPolicy]
"""Policies of one shard share their links: a slot is in one of them at a time."""


class _Everything:
    def admits(self, slot: int, now: float) -> bool:
        return True


EVERYTHING = _Everything()
