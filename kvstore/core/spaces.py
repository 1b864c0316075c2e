"""Namespaces as the core knows them, and the accounts of the tenants they belong to.

A chain is the linked slots of one key (`Versions.next`), found here by its key: no key of one namespace is
ever seen from another. What is being written stands apart, so that no reader ever meets it.

A purge writes one number: what was created at or before it is dead from that moment on, whatever there is
of it. A sweep frees the bytes later.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.core.state import Namespace
from kvstore.nouns import BlockKey, NamespaceId


@dataclass(slots=True, eq=False)
class Account:
    """Bytes of one tenant on this shard. `idle_nbytes` of them could be given up."""

    tenant: str
    quota_nbytes: int
    used_nbytes: int = 0
    idle_nbytes: int = 0


@dataclass(slots=True, eq=False)
class Space:
    """One namespace."""

    id: NamespaceId
    index: int  # its number in the columns
    namespace: Namespace
    account: Account
    heads: dict[BlockKey, int] = field(default_factory=dict)  # the first slot of each key's chain
    staged: dict[BlockKey, list[int]] = field(default_factory=dict)
    horizons: dict[BlockKey, int] = field(default_factory=dict)
    """Of chains that lost a version: no snapshot below is answered, better a miss than an answer that may
    have changed. Gone with the chain's last version: an empty chain is a miss anyway."""
    purged: int = 0  # what was created up to this revision is dead
    purged_epochs: dict[int, int] = field(default_factory=dict)  # the same, by epoch id
    purged_last: int = 0  # revision of the last purge of either kind: nothing is known of what stood before

    def floor(self, epoch_id: int) -> int:
        """What was created at or before this revision was purged."""
        return max(self.purged, self.purged_epochs.get(epoch_id, 0))
