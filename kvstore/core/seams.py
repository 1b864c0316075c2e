"""The Protocols that policies fill. The core owns them: a policy sees what the core knows, no more."""

from __future__ import annotations

from typing import Protocol


class ReplacementPolicy(Protocol):
    """The order in which evictable slots are given up, for one epoch of one model.

    A slot is in the policy exactly while its version is live and unpinned. Nothing here may fail.
    """

    def insert(self, slot: int) -> None:
        """The slot became evictable, just used. Changes the order. The slot must not be present."""
        ...

    def remove(self, slot: int) -> None:
        """The slot was pinned, retired or evicted. It must be present."""
        ...

    def victim(self) -> int | None:
        """The slot to give up next; None when there is none. Changes nothing."""
        ...

    def __len__(self) -> int: ...
