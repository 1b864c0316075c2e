"""Who goes first when room is needed, of one tier.

Idle versions (live, pinned by nobody) stand in one queue per tenant, epoch and priority, each kept by a
replacement policy. Advancing an epoch therefore moves nothing: the queues of past epochs are simply emptied
first, the oldest epoch first.

*Tenants and priorities.* Of the heads of all queues (of epochs that are equally old) the one let go longest
ago, of whatever priority, says which tenant gives something up; then it is that tenant's head of the lowest
priority that goes, and of equal ones the one let go longest ago. So what a tenant says is dear it pays for
with what it said is not, never with what others hold. A version whose time is over (retention.py) enters the
queue of the default priority, as if it had just been used, before the next victim is named.

*Prefixes.* A chain without its middle is not reachable, so a version goes only after what was built on it,
whatever the policy says: who comes up as the victim and has others built on it is lifted out of its queue,
and put back when the last of them goes. So is who is pinned, until it is let go, and who is about to be
asked for (kept.py). When all that is idle waits for one of these, the deepest of it goes all the same: what
`can_make_room` promised holds. A version that was written before what it is built on is known to nobody as
its child. A policy that names the inside of a million chains first would have all of it lifted: from bounds
on (of one call, and of all that is lifted) the leaf of whom it names goes instead, found by following the
child that came last, unless that is pinned, dearer or of another epoch.

Cost: O(1) a use, O(queues) a victim (101 a tenant and epoch at most), O(log n) the end of a priority. Leaves
are O(1) each while a chain goes, its length the first time; each version is lifted once a use at most, in
O(log of those lifted), which is also what the deepest of them costs (lifted.py).
Failure is an answer: no victim.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container
from typing import Final, NamedTuple

from kvstore.core.epochs import EpochTable
from kvstore.core.lifted import Lifted, Where
from kvstore.core.links import Links
from kvstore.core.retention import PRIORITY_DEFAULT, Ends, Retentions
from kvstore.core.seams import MakePolicy, Seen, VictimQueue
from kvstore.core.uses import Use, Uses
from kvstore.core.versions import NONE, Versions

_LIFTS_A_CALL: Final = 256  # about 1 ms
_LIFTED_MAX: Final = 4_096  # objects of the collector's, which walks them all


class _Head(NamedTuple):
    """Who goes first of one queue. The least of all heads says which tenant is to give something up."""

    newness: int  # of its epoch, 0 for a current one
    idle_since: int
    tenant: str
    priority: int
    slot: int


class Evictables:
    def __init__(
        self,
        make_policy: MakePolicy,
        epochs: EpochTable,
        versions: Versions,
        uses: Uses,
        retentions: Retentions,
        tenant_of: Callable[[int], str],
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
        self._newest_child = array("i")  # of these, the one that came last, or NONE when it left
        self._climbing = NONE  # who was named last
        self._reached = NONE  # and the end of what was built on it, or what that end was built on
        self._entered = bytearray()
        self._idle_since = array("Q")
        self._lifted = Lifted(versions)
        self._queues: dict[Where, VictimQueue] = {}
        self._retentions = retentions
        self._tenant_of = tenant_of
        self._priorities = bytearray()  # of the queue the slot stands in, or will when it is let go of
        self._ends = Ends()
        self._make_queue = make_policy(Seen(uses, self._links, self._places))
        self._order = 0
        self._named = NONE  # the last victim: if it leaves now, it was evicted

    def born(self, slot: int) -> None:
        """The slot holds a new version, on this tier or not: nothing was built on it yet."""
        missing = slot + 1 - len(self._places)
        if missing > 0:
            self._links.grow(missing)
            for flags in (self._places, self._entered, self._priorities):
                flags.extend(bytes(missing))
            for column in (self._children, self._idle_since):
                column.frombytes(bytes(missing * column.itemsize))
            self._newest_child.extend(array("i", (NONE,)) * missing)
        self._children[slot] = 0
        self._newest_child[slot] = NONE

    def enter(self, slot: int) -> None:
        """The slot's version lies on this tier from now on. It is pinned."""
        self._entered[slot] = 1
        self._priorities[slot] = self._retentions.priorities[slot]
        parent = self._uses.parent(slot)
        if parent != NONE and parent < len(self._children):
            self._children[parent] += 1
            self._newest_child[parent] = slot

    def use(self, tenant: str, use: Use) -> None:
        """Versions on this tier, of one tenant and epoch, were just used and are idle now."""
        epoch = self._versions.epochs[use.slots[0]]
        if len(self._lifted):
            for slot in use.slots:
                if slot in self._lifted:
                    self._put_back(slot)
        first = self._order
        self._order += len(use.slots)
        idle_since = self._idle_since
        for order, slot in enumerate(use.slots, first):
            idle_since[slot] = order
        if self._retentions.kept:
            self._use_by_priority(tenant, epoch, use)
        else:
            self._queue((tenant, epoch, PRIORITY_DEFAULT)).use(use)

    def let_go(self, tenant: str, slot: int) -> None:
        """A version on this tier was held for something that is no use of it, and is idle again."""
        if not self._places[slot]:
            self.use(tenant, self._uses.last(slot))
        elif slot in self._lifted:
            if self._may_go(slot):
                self._put_back(slot)
            else:
                self._lifted.let_go(slot)

    def may_go_again(self, slot: int) -> None:
        """What kept a version on this tier, if it was here and kept, is over."""
        if slot in self._lifted and self._may_go(slot):
            self._put_back(slot)

    def retained(self, slot: int) -> None:
        """What a version on this tier is worth was said anew."""
        self._ends.forget(slot)
        self._move(slot, self._retentions.priorities[slot])
        self._ends.expect(slot, self._retentions.end(slot, self._uses.used_s[slot]))

    def forget(self, tenant: str, slot: int) -> None:
        """The slot's version leaves this tier, or is not live any more."""
        if slot >= len(self._entered) or not self._entered[slot]:
            return
        self._entered[slot] = 0
        self._ends.forget(slot)
        if self._places[slot]:
            if slot in self._lifted:
                self._put_back(slot)
            where = tenant, self._versions.epochs[slot], self._priorities[slot]
            queue = self._queues[where]
            queue.remove(slot, slot == self._named)
            if not len(queue) and self._epochs.lag(where[1]) and not self._lifted.any_of(where):
                del self._queues[where]  # of a past epoch: most likely it never fills again
        self._named = NONE
        parent = self._uses.parent(slot)
        here = parent != NONE and parent < len(self._children)
        if slot == self._climbing:
            self._climbing = NONE
        if slot == self._reached:
            self._reached = parent if here and self._entered[parent] else NONE
        if here and self._children[parent]:
            self._children[parent] -= 1
            if self._newest_child[parent] == slot:
                self._newest_child[parent] = NONE
            self.may_go_again(parent)

    def victim(self, tenant: str | None, now: float) -> int | None:
        """The next to go, of one tenant or of all; None when nothing is idle."""
        self._end_priorities(now)
        heads = []
        for (owner, epoch, priority), queue in self._queues.items():
            if tenant not in (None, owner) or not len(queue):
                continue
            slot = self._head((owner, epoch, priority), queue, now)
            if slot is not None:
                newness = -self._epochs.lag(epoch)
                heads.append(_Head(newness, self._idle_since[slot], owner, priority, slot))
        victim = _cheapest(heads) if heads else self._lifted.deepest(tenant)
        self._named = NONE if victim is None else victim
        return victim

    def holds(self, slot: int) -> bool:
        """Is it in a queue, or lifted out of one?"""
        return slot < len(self._places) and bool(self._places[slot])

    def queued(self) -> int:
        return sum(len(queue) for queue in self._queues.values()) + len(self._lifted)

    # -- inside ------------------------------------------------------------------------------------

    def _head(self, where: Where, queue: VictimQueue, now: float) -> int | None:
        lifts = 0
        while (slot := queue.victim(now)) is not None and not self._may_go(slot):
            if lifts >= _LIFTS_A_CALL or len(self._lifted) >= _LIFTED_MAX:
                leaf = self._leaf(slot)
                if leaf is not None:
                    return leaf
            lifts += 1
            queue.lift(slot)
            self._lifted.add(slot, where)
        return slot

    def _leaf(self, named: int) -> int | None:
        """What goes instead of `named`: the end of what was built on it, if that is worth no more."""
        slot = self._reached if named == self._climbing and self._reached != NONE else named
        while self._children[slot]:
            slot = self._newest_child[slot]
            if slot == NONE:
                return None
        self._climbing, self._reached = named, slot
        epochs, priorities = self._versions.epochs, self._priorities
        as_dear = epochs[slot] == epochs[named] and priorities[slot] == priorities[named]
        return slot if as_dear and self._may_go(slot) else None

    def _queue(self, where: Where) -> VictimQueue:
        queue = self._queues.get(where)
        if queue is None:
            queue = self._queues[where] = self._make_queue()
        return queue

    def _use_by_priority(self, tenant: str, epoch: int, use: Use) -> None:
        retentions, standing = self._retentions, self._priorities
        by_priority: dict[int, list[int]] = {}
        for slot in use.slots:
            priority = retentions.priorities[slot]
            by_priority.setdefault(priority, []).append(slot)
            if standing[slot] != priority:  # its time was over, and begins anew
                if self._places[slot]:
                    self._queues[tenant, epoch, standing[slot]].remove(slot, False)
                standing[slot] = priority
            if priority != PRIORITY_DEFAULT:
                self._ends.expect(slot, retentions.end(slot, use.now))
        for priority, slots in by_priority.items():
            self._queue((tenant, epoch, priority)).use(use._replace(slots=slots))

    def _end_priorities(self, now: float) -> None:
        for slot in self._ends.past(now):
            end = self._retentions.end(slot, self._uses.used_s[slot])
            if end > now:  # used since
                self._ends.expect(slot, end)
            else:
                self._move(slot, PRIORITY_DEFAULT)

    def _move(self, slot: int, priority: int) -> None:
        """To the queue of another priority, if it stands in one."""
        before, self._priorities[slot] = self._priorities[slot], priority
        if before == priority or not self._places[slot]:
            return
        if slot in self._lifted:
            self._put_back(slot)
        tenant, epoch = self._tenant_of(slot), self._versions.epochs[slot]
        self._queues[tenant, epoch, before].remove(slot, False)
        self._queue((tenant, epoch, priority)).use(self._uses.last(slot))

    def _may_go(self, slot: int) -> bool:
        return not (self._versions.pins[slot] or self._children[slot] or slot in self._kept)

    def _put_back(self, slot: int) -> None:
        self._queues[self._lifted.remove(slot)].put_back(slot)


def _cheapest(heads: list[_Head]) -> int:
    """Whose turn it is says the least head; what of theirs goes, the priorities."""
    if len(heads) == 1:
        return heads[0].slot
    turn = min(heads)
    own = (head for head in heads if (head.newness, head.tenant) == (turn.newness, turn.tenant))
    return min(own, key=lambda head: (head.priority, head.idle_since)).slot
