"""The tiers of one shard as the core sees them: bytes, and who gives way for others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.core.eviction import Evictables
from kvstore.core.leases import LeaseTable
from kvstore.core.spaces import Account
from kvstore.core.versions import Versions
from kvstore.nouns import BlockRef, Tier


@dataclass(slots=True, eq=False)
class Room:
    """One tier. `held` and `coming` are its flags in the column of residences."""

    tier: Tier
    held: int
    coming: int
    capacity_nbytes: int
    evictables: Evictables
    used_nbytes: int = 0  # of what lies there, and of what is on its way
    ceiling_nbytes: int = 0  # of what is used while that is over a capacity that shrank: it only falls

    @property
    def is_over(self) -> bool:
        """Did it shrink below what it holds?"""
        return self.used_nbytes > self.capacity_nbytes

    def lacks(self, nbytes: int) -> bool:
        """Must somebody give way before a frame of `nbytes` fits?"""
        return self.used_nbytes + nbytes > self.capacity_nbytes


class Rooms:
    """Both tiers, and what of the host could be given up: what is live there and pinned by nobody."""

    def __init__(self, host: Room, nvme: Room, versions: Versions, time: LeaseTable) -> None:
        self._both = host, nvme
        self._host = host
        self._nvme = nvme
        self._versions = versions
        self._time = time
        self.idle_nbytes = self.idle_versions = 0

    def __iter__(self) -> Iterator[Room]:
        return iter(self._both)

    def can_make_room(self, nbytes: int) -> bool:
        """Would a frame of `nbytes` fit on the host if all that is idle went?"""
        has_slot = self._versions.has_room() or self.idle_versions > 0 or self._nvme_victim() is not None
        return has_slot and self.can_hold(nbytes)

    def can_hold(self, nbytes: int) -> bool:
        """Has the host so many bytes that are free, or of what is idle?"""
        return self._host.used_nbytes - self.idle_nbytes + nbytes <= self._host.capacity_nbytes

    def next_victim(self, account: Account, nbytes: int) -> int | None:
        """Who is to leave the host before a frame of `nbytes` of this tenant fits; None when it fits now."""
        evictables = self._host.evictables
        if account.used_nbytes + nbytes > account.quota_nbytes:
            return evictables.victim(account.tenant, self._time.now)
        return evictables.victim(None, self._time.now) if self._host.lacks(nbytes) else None

    def next_slot_victim(self) -> int | None:
        """Who is to go altogether before there is a slot for another; None when there is one now."""
        if self._versions.has_room():
            return None
        victim = self._nvme_victim()
        return self._host.evictables.victim(None, self._time.now) if victim is None else victim

    def _nvme_victim(self) -> int | None:
        return self._nvme.evictables.victim(None, self._time.now) if self._nvme.capacity_nbytes else None


class Freed(NamedTuple):
    """Bytes nobody needs any more where they lie: the driver is to discard them there."""

    ref: BlockRef
    tier: Tier
    lives_on: bool  # on another tier: whoever reads past the shard must ask it from now on
