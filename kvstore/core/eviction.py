"""Who goes first when room is needed, of one tier.

Idle versions (live, pinned by nobody) stand in one queue per tenant and epoch, each kept by a replacement
policy. Advancing an epoch therefore moves nothing: the queues of past epochs are simply emptied first, the
oldest epoch first. Among current epochs, of several models, the version that was let go longest ago goes.

*Prefixes.* A chain without its middle is not reachable, so a version goes only after what was built on it,
whatever the policy says: who comes up as the victim and has others built on it is lifted out of its queue,
and put back when the last of them goes. So is who is pinned, until it is let go, and who is about to be
asked for (kept.py). When all that is idle waits for one of these, the deepest of it goes all the same: what
`can_make_room` promised holds. A version that was written before what it is built on is known to nobody as
its child.

Cost: O(1) a use, O(queues that are not empty) a victim, and each version is lifted once a use at most.
Failure is an answer: no victim.
"""

from __future__ import annotations

from array import array
from collections.abc import Container

from kvstore.core.epochs import EpochTable
from kvstore.core.links import Links
from kvstore.core.seams import MakePolicy, Seen, VictimQueue
from kvstore.core.uses import Use, Uses
from kvstore.core.versions import NONE, Versions

TenantsEpoch = tuple[str, int]


class Evictables:
    def __init__(
        self,
        make_policy: MakePolicy,
        epochs: EpochTable,
        versions: Versions,
        uses: Uses,
        kept: Container[int] = (),
    ) -> None:
        """`kept` are not to go before others, whatever the policy says."""
        self._kept = kept
        self._epochs = epochs
        self._versions = versions
        self._uses = uses
        self._links = Links()
        self._places = bytearray()
        self._children = array("I")  # versions of this tier that were built on the slot's
        self._entered = bytearray()
        self._idle_since = array("Q")
        self._lifted: dict[int, VictimQueue] = {}
        self._queues: dict[TenantsEpoch, VictimQueue] = {}
        self._make_queue = make_policy(Seen(uses, self._links, self._places))
        self._order = 0
        self._named = NONE  # the last victim: if it leaves now, it was evicted

    def enter(self, slot: int) -> None:
        """The slot's version lies on this tier from now on. It is pinned."""
        missing = slot + 1 - len(self._places)
        if missing > 0:
            self._links.grow(missing)
            for flags in (self._places, self._entered):
                flags.extend(bytes(missing))
            for column in (self._children, self._idle_since):
                column.frombytes(bytes(missing * column.itemsize))
        self._entered[slot] = 1
        self._children[slot] = 0
        parent = self._uses.parent(slot)
        if parent != NONE and parent < len(self._children):
            self._children[parent] += 1

    def use(self, tenant: str, use: Use) -> None:
        """Versions on this tier, of one tenant and epoch, were just used and are idle now."""
        where = tenant, self._versions.epochs[use.slots[0]]
        queue = self._queues.get(where)
        if queue is None:
            queue = self._queues[where] = self._make_queue()
        if self._lifted:
            for slot in use.slots:
                if slot in self._lifted:
                    self._put_back(slot)
        first = self._order
        self._order += len(use.slots)
        idle_since = self._idle_since
        for order, slot in enumerate(use.slots, first):
            idle_since[slot] = order
        queue.use(use)

    def let_go(self, tenant: str, slot: int) -> None:
        """A version on this tier was held for something that is no use of it, and is idle again."""
        if not self._places[slot]:
            self.use(tenant, self._uses.last(slot))
        else:
            self.may_go_again(slot)

    def may_go_again(self, slot: int) -> None:
        """What kept a version on this tier, if it was here and kept, is over."""
        if slot in self._lifted and self._may_go(slot):
            self._put_back(slot)

    def forget(self, tenant: str, slot: int) -> None:
        """The slot's version leaves this tier, or is not live any more."""
        if slot >= len(self._entered) or not self._entered[slot]:
            return
        self._entered[slot] = 0
        if self._places[slot]:
            if slot in self._lifted:
                self._put_back(slot)
            where = tenant, self._versions.epochs[slot]
            queue = self._queues[where]
            queue.remove(slot, slot == self._named)
            if not len(queue) and self._epochs.lag(where[1]) and queue not in self._lifted.values():
                del self._queues[where]  # of a past epoch: most likely it never fills again
        self._named = NONE
        parent = self._uses.parent(slot)
        if parent != NONE and parent < len(self._children) and self._children[parent]:
            self._children[parent] -= 1
            self.may_go_again(parent)

    def victim(self, tenant: str | None, now: float) -> int | None:
        """The next to go, of one tenant or of all; None when nothing is idle."""
        first, order = None, None
        for where, queue in self._queues.items():
            if tenant is not None and where[0] != tenant:
                continue
            slot = self._head(queue, now)
            if slot is None:
                continue
            claim = -self._epochs.lag(where[1]), self._idle_since[slot]
            if order is None or claim < order:
                first, order = slot, claim
        if first is None:
            first = self._deepest_lifted(tenant)
        self._named = NONE if first is None else first
        return first

    def holds(self, slot: int) -> bool:
        """Is it in a queue, or lifted out of one?"""
        return slot < len(self._places) and bool(self._places[slot])

    def queued(self) -> int:
        return sum(len(queue) for queue in self._queues.values()) + len(self._lifted)

    # -- inside ------------------------------------------------------------------------------------

    def _head(self, queue: VictimQueue, now: float) -> int | None:
        while (slot := queue.victim(now)) is not None and not self._may_go(slot):
            queue.lift(slot)
            self._lifted[slot] = queue
        return slot

    def _may_go(self, slot: int) -> bool:
        return not (self._versions.pins[slot] or self._children[slot] or slot in self._kept)

    def _put_back(self, slot: int) -> None:
        self._lifted.pop(slot).put_back(slot)

    def _deepest_lifted(self, tenant: str | None) -> int | None:
        versions = self._versions
        queues = {id(queue) for where, queue in self._queues.items() if tenant in (None, where[0])}
        idle = (s for s, queue in self._lifted.items() if not versions.pins[s] and id(queue) in queues)
        return max(idle, key=versions.chain_indexes.__getitem__, default=None)
