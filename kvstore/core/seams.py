"""The Protocols that policies fill. The core owns them: a policy sees what the core knows, no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvstore.core.links import Links
from kvstore.core.uses import Use, Uses


class Seen(NamedTuple):
    """What policies see of the versions of one tier, and where they keep what they know of each: columns,
    one entry a slot. A queue is of one priority (retention.py): no policy sees any."""

    uses: Uses
    links: Links  # a slot is in one list at a time
    places: bytearray  # 0: the slot is in no queue; else a number of its policy's own, which list it is in


class VictimQueue(Protocol):
    """The order in which slots of one tier are given up: of one tenant, one epoch and one priority.

    Every slot whose version is live and unpinned is in its queue, and so may be one that was pinned since
    or that others are built on. When such a one comes up as the victim the core lifts it out and asks again:
    pinning, which is in the way of every read, touches no queue, and no policy need know of prefixes.
    Nothing here may fail; all is O(1), or O(lists).
    """

    def use(self, use: Use) -> None:
        """The slots were used and are idle now: they enter (`places[slot]` is 0) or move.

        They come tail first: who orders by recency alone has the leaf of a prefix before its parent. The
        columns of `seen.uses` still say what was known before this use.
        """
        ...

    def lift(self, slot: int) -> None:
        """The victim must stay for now: out of the order. Its place (`places[slot]`) is kept."""
        ...

    def put_back(self, slot: int) -> None:
        """One that was lifted may go now: it is the next victim of its list."""
        ...

    def remove(self, slot: int, evicted: bool) -> None:
        """The slot leaves for good, by eviction or because its version was retired. It is not lifted.
        `places[slot]` must be 0 afterwards."""
        ...

    def victim(self, now: float) -> int | None:
        """The slot to give up next; None when there is none. May reorder; asked again it names the same."""
        ...

    def __len__(self) -> int:
        """Slots in the order: those lifted are not."""
        ...


MakeQueue = Callable[[], VictimQueue]
"""Queues of one policy share what it learnt, across tenants and epochs."""
MakePolicy = Callable[[Seen], MakeQueue]
"""Called once a tier of a shard."""


class ContinuationPredictor(Protocol):
    """How likely a session goes on. One a shard, whatever its tiers."""

    def observe(self, use: Use) -> None:
        """A use happened. The columns of the shard's `Uses` still say what was known before it."""
        ...

    def probability(self, slot: int, within_s: float, now: float) -> float:
        """That the chain which was let go with this slot is used again within so many seconds from now."""
        ...


class AdmissionPolicy(Protocol):
    """Which versions are worth a write to the next tier: most are never used again."""

    def admits(self, slot: int, now: float) -> bool:
        """Asked of a candidate for demotion: its version is live, and was used at least once. O(1); changes
        nothing."""
        ...


MakePredictor = Callable[[Uses], ContinuationPredictor]
MakeAdmission = Callable[[Uses, ContinuationPredictor], AdmissionPolicy]
