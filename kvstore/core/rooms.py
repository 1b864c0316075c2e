"""The tiers of one shard as the core sees them: bytes, and who gives way for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvstore.core.eviction import Evictables
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

    def lacks(self, nbytes: int) -> bool:
        """Must somebody give way before a frame of `nbytes` fits?"""
        return self.used_nbytes + nbytes > self.capacity_nbytes


class Freed(NamedTuple):
    """Bytes nobody needs any more where they lie: the driver is to discard them there."""

    ref: BlockRef
    tier: Tier
    lives_on: bool  # on another tier: whoever reads past the shard must ask it from now on
