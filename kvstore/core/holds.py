"""Who holds what: leases, and the slots each pins. What is held is held by a lease, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.core.index import Index
from kvstore.core.leases import LeaseTable
from kvstore.core.spaces import Space
from kvstore.nouns import LeaseId


class Holds:
    def __init__(self, leases: LeaseTable, index: Index) -> None:
        self.leases = leases
        self._index = index
        self._held: dict[LeaseId, list[int]] = {}

    @property
    def by_lease(self) -> Mapping[LeaseId, Sequence[int]]:
        return self._held

    def grant(self, owner: str, lease_s: float, space: Space, slots: Sequence[int], now: float) -> LeaseId:
        """A new lease that pins the slots. Raises OverLimit, and then pins nothing."""
        lease = self.leases.grant(owner, lease_s, now)
        self._held[lease] = list(slots)
        self._index.pin(space, slots)
        return lease

    def hold(self, lease: LeaseId, space: Space, slot: int) -> None:
        """Pin one more slot under a lease that stands."""
        self._held[lease].append(slot)
        self._index.pin(space, (slot,))

    def end(self, lease: LeaseId) -> list[int]:
        """End a lease; the pins it held, for the caller to let go of. None for one that is gone."""
        return self._held.pop(lease) if self.leases.end(lease) else []
