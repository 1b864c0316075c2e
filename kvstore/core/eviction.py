"""Who goes first when room is needed.

Idle versions (live, pinned by nobody) stand in one queue per tenant and epoch, each kept by a replacement
policy. Advancing an epoch therefore moves nothing: the queues of past epochs are simply emptied first, the
oldest epoch first. Among current epochs, of several models, the version that was let go longest ago
goes. Cost: O(1) a use, O(queues that are not empty) a victim.
"""

from __future__ import annotations

from kvstore.core.epochs import EpochTable
from kvstore.core.links import Links
from kvstore.core.seams import MakePolicy, ReplacementPolicy
from kvstore.core.versions import Versions

TenantsEpoch = tuple[str, int]


class Evictables:
    """Failure is an answer: no victim."""

    def __init__(
        self, make_policy: MakePolicy, epochs: EpochTable, versions: Versions, links: Links, flag: int
    ) -> None:
        """Of one tier: `flag` is its bit in the column of who is queued, `links` what its queues share."""
        self._make_policy = make_policy
        self._epochs = epochs
        self._versions = versions
        self._links = links
        self._flag = flag
        self._queues: dict[TenantsEpoch, ReplacementPolicy] = {}
        self._uses = 0

    def use(self, tenant: str, slot: int) -> None:
        """The slot's version was just used and is idle now."""
        versions = self._versions
        where = tenant, versions.epochs[slot]
        queue = self._queues.get(where)
        if queue is None:
            queue = self._queues[where] = self._make_policy(self._links)
        if versions.queued[slot] & self._flag:
            queue.remove(slot)
        else:
            versions.queued[slot] |= self._flag
        self._uses += 1
        versions.idle_since[slot] = self._uses
        queue.insert(slot)

    def forget(self, tenant: str, slot: int) -> None:
        """The slot's version goes, or came up as a victim while it is pinned."""
        if not self._versions.queued[slot] & self._flag:
            return
        self._versions.queued[slot] &= ~self._flag
        where = tenant, self._versions.epochs[slot]
        queue = self._queues[where]
        queue.remove(slot)
        if not len(queue) and self._epochs.lag(where[1]):
            del self._queues[where]  # of a past epoch: most likely it never fills again

    def victim(self, tenant: str | None = None) -> int | None:
        """The next to go, of one tenant or of all; None when nothing is idle."""
        first, order = None, None
        for where in list(self._queues):
            slot = self._head(where)
            if slot is None or (tenant is not None and where[0] != tenant):
                continue
            claim = -self._epochs.lag(where[1]), self._versions.idle_since[slot]
            if order is None or claim < order:
                first, order = slot, claim
        return first

    def queued(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def _head(self, where: TenantsEpoch) -> int | None:
        """The first of a queue that nobody pinned since it was let go."""
        while (queue := self._queues.get(where)) is not None:
            slot = queue.victim()
            if slot is None or not self._versions.pins[slot]:
                return slot
            self.forget(where[0], slot)
        return None
