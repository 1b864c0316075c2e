"""The index of one shard: chains, the slots their bytes sit in, and what may be given up for new ones.

    free --stage--> STAGED --publish--> LIVE --retire--> RETIRED --last unpin--> free
                      |                  |     (GONE)            (not pinned: straight to free)
                      +----- drop -------+---- evict (only if not pinned) -----> free

Bytes are budgeted, not slots: blocks of different layouts have different sizes. Every step costs O(versions
of the key), a handful; making room is O(evicted). Only letting go may cost more: whoever uses a block uses
what it was built on, so that no idle block ever goes before an idle block built on it, and the idle ancestors
of what is let go move up with it: each once, and 1,024 of them at most, since how long a chain is its writers
say. Who lets go of a whole chain has nothing above it to move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.core.epochs import EpochTable
from kvstore.core.eviction import Evictables
from kvstore.core.seams import MakePolicy
from kvstore.core.spaces import Account, Space
from kvstore.core.state import CoreConfig, Namespace, Offer
from kvstore.core.versions import NONE, WRITTEN, State, Version, Versions
from kvstore.nouns import BlockRef, NamespaceId, Quality, Tier

_LIVE, _STAGED = int(State.LIVE), int(State.STAGED)
_UNLIMITED = 1 << 63
_CLIMB_MAX = 1_024
"""Idle ancestors that move up with what is let go, at most: a chain is as long as its writers say."""


class Index:
    def __init__(self, config: CoreConfig, make_policy: MakePolicy, epochs: EpochTable) -> None:
        self.versions = Versions(config.limits.slots_max)
        self.spaces: dict[NamespaceId, Space] = {}
        self.by_index: list[Space] = []
        self.accounts: dict[str, Account] = {}
        self.used_nbytes = self.idle_nbytes = self.idle_versions = 0
        self.freed: list[BlockRef] = []  # whose bytes the driver is to discard; it drains the list
        self.evictables = Evictables(make_policy, epochs, self.versions)
        self._config = config
        self._epochs = epochs

    def __len__(self) -> int:
        return len(self.versions)

    def open(self, namespace_id: NamespaceId, namespace: Namespace) -> Space:
        space = self.spaces.get(namespace_id)
        if space is None:
            tenant = namespace.tenant
            quota = self._config.quotas.get(tenant, _UNLIMITED)
            account = self.accounts.setdefault(tenant, Account(tenant, quota))
            space = Space(namespace_id, len(self.by_index), namespace, account)
            self.spaces[namespace_id] = space
            self.by_index.append(space)
        return space

    def space_of(self, slot: int) -> Space:
        return self.by_index[self.versions.spaces[slot]]

    def ref(self, slot: int) -> BlockRef:
        return BlockRef(self._config.shard, self._config.incarnation, slot, self.versions.generations[slot])

    def row(self, slot: int) -> Version:
        """What stands in a slot that is in use, as a value."""
        table = self.versions
        return Version(
            self.space_of(slot).id,
            table.key(slot),
            table.parent(slot),
            table.chain_indexes[slot],
            table.placement(slot),
            self._epochs.bound[table.epochs[slot]].epoch,
            Quality(table.qualities[slot]),
            self.ref(slot),
            table.nbytes[slot],
            Tier(table.tiers[slot]),
            State(table.states[slot]),
            table.created[slot],
            table.retired[slot],
            bool(table.written[slot] & WRITTEN),
            table.pins[slot],
        )

    def slots(self) -> Iterator[int]:
        """Those in use."""
        return (slot for slot, state in enumerate(self.versions.states) if state)

    def rows(self) -> Iterator[Version]:
        return map(self.row, self.slots())

    def at(self, slot: int, generation: int) -> Version | None:
        """The version a reference of this generation speaks of; None when the slot was reused since."""
        return self.row(slot) if self.versions.is_current(slot, generation) else None

    def serves(self, namespace: NamespaceId, ref: BlockRef) -> bool:
        """Does the reference still speak of a committed version of this namespace? A row costs ten times
        as much, and this is asked for every frame that is sent."""
        table, slot = self.versions, ref.slot
        ours = ref.incarnation == self._config.incarnation and ref.shard == self._config.shard
        if not ours or not table.is_current(slot, ref.generation) or table.states[slot] == _STAGED:
            return False
        return self.space_of(slot).id == namespace

    # -- room --------------------------------------------------------------------------------------

    def can_make_room(self, nbytes: int) -> bool:
        """Would a frame of `nbytes` fit if all that is idle went?"""
        has_slot = self.versions.has_room() or self.idle_versions > 0
        return has_slot and self.used_nbytes - self.idle_nbytes + nbytes <= self._config.capacity_nbytes

    def next_victim(self, account: Account, nbytes: int) -> int | None:
        """Whom to evict before a frame of `nbytes` of this tenant fits; None when it fits now."""
        if account.used_nbytes + nbytes > account.quota_nbytes:
            return self.evictables.victim(account.tenant)
        if self.used_nbytes + nbytes > self._config.capacity_nbytes or not self.versions.has_room():
            return self.evictables.victim()
        return None

    # -- a version's life --------------------------------------------------------------------------

    def stage(self, space: Space, epoch_id: int, quality: Quality, offer: Offer) -> int:
        table, slot = self.versions, self.versions.take()
        table.name(slot, offer.key, offer.parent, offer.placement)
        table.states[slot], table.tiers[slot] = _STAGED, Tier.HOST
        table.spaces[slot], table.epochs[slot] = space.index, epoch_id
        table.qualities[slot], table.chain_indexes[slot] = quality, offer.chain_index
        table.nbytes[slot] = offer.nbytes
        space.staged.setdefault(offer.key, []).append(slot)
        self.used_nbytes += offer.nbytes
        space.account.used_nbytes += offer.nbytes
        return slot

    def publish(self, slot: int, revision: int) -> None:
        """Make a staged version visible from `revision` on. It must be pinned: whoever lets go decides
        what goes first."""
        table, space, key = self.versions, self.space_of(slot), self.versions.key(slot)
        assert table.pins[slot], "published without a pin"
        self._unstage(space, slot)
        table.states[slot], table.created[slot] = _LIVE, revision
        before, after = NONE, space.heads.get(key, NONE)
        while after != NONE and self._rank(after) > self._rank(slot):
            before, after = after, table.next[after]
        table.next[slot] = after
        if before == NONE:
            space.heads[key] = slot
        else:
            table.next[before] = slot

    def retire(self, slot: int, revision: int, into: State = State.RETIRED) -> None:
        """Take a live version out of sight. Its bytes go now, or with its last pin."""
        table, space = self.versions, self.space_of(slot)
        table.states[slot], table.retired[slot] = into, revision
        if into is State.GONE:  # older snapshots lose it too, and must not see a lesser one instead
            space.horizons[table.key(slot)] = revision
        if table.pins[slot]:
            self.evictables.forget(space.account.tenant, slot)
        else:
            self._no_longer_idle(space, slot)
            self.drop(slot)

    def drop(self, slot: int) -> None:
        """Free the slot and forget the version. It must be staged, or retired and not pinned."""
        table, space = self.versions, self.space_of(slot)
        if table.states[slot] == _STAGED:
            self._unstage(space, slot)
        else:
            self._unlink(space, slot)
        self.evictables.forget(space.account.tenant, slot)  # it may have been pinned where it stood
        self.used_nbytes -= table.nbytes[slot]
        space.account.used_nbytes -= table.nbytes[slot]
        self.freed.append(self.ref(slot))
        table.give_back(slot)

    def pin(self, space: Space, slots: Sequence[int]) -> None:
        """Hold live or staged versions of one namespace."""
        table, idle, found = self.versions, 0, 0
        pins, nbytes, states = table.pins, table.nbytes, table.states
        for slot in slots:
            held = pins[slot]
            if not held and states[slot] == _LIVE:
                idle += nbytes[slot]
                found += 1
            pins[slot] = held + 1
        self.idle_nbytes -= idle
        self.idle_versions -= found
        space.account.idle_nbytes -= idle

    def unpin(self, slots: Sequence[int]) -> None:
        """Take one pin of each, as often as it is named: all of one use, whoever pinned them."""
        table = self.versions
        pins, states, spaces, epochs, created = (
            table.pins, table.states, table.spaces, table.epochs, table.created,
        )  # fmt: skip
        idle: dict[int, None] = {}
        of, floor = (-1, -1), 0  # of which namespace and epoch the floor is: nearly always of all slots
        for slot in slots:
            held = pins[slot] - 1
            pins[slot] = held
            state = states[slot]
            if held or state == _STAGED:
                continue
            if of != (spaces[slot], epochs[slot]):
                of = spaces[slot], epochs[slot]
                floor = self._floor(slot)
            if state == _LIVE and created[slot] > floor:
                idle[slot] = None
            else:
                self.drop(slot)
        for slot in idle:
            nbytes = table.nbytes[slot]
            self.idle_nbytes += nbytes
            self.by_index[spaces[slot]].account.idle_nbytes += nbytes
        self.idle_versions += len(idle)
        used = self._with_idle_ancestors(idle)
        for slot in sorted(used, key=table.chain_indexes.__getitem__, reverse=True):
            self.evictables.use(self.by_index[spaces[slot]].account.tenant, slot)

    def is_live(self, slot: int) -> bool:
        return self.versions.states[slot] == _LIVE and not self.is_dead(slot)

    def is_purged(self, slot: int) -> bool:
        """As part of a namespace or an epoch, not by its key: it stands in the table until it is swept."""
        versions = self.versions
        return versions.created[slot] <= self.space_of(slot).floor(versions.epochs[slot])

    def is_dead(self, slot: int) -> bool:
        """Live by its state, yet purged, or of an epoch that was dropped: nobody will ever see it."""
        return self.versions.created[slot] <= self._floor(slot)

    def chain(self, space: Space, head: int) -> Iterator[int]:
        """The slots of a chain, from its head on."""
        while head != NONE:
            yield head
            head = self.versions.next[head]

    # -- inside ------------------------------------------------------------------------------------

    def _floor(self, slot: int) -> int:
        """Revision up to which everything of the slot's namespace and epoch is dead."""
        epoch_id = self.versions.epochs[slot]
        return _UNLIMITED if self._epochs.is_dropped(epoch_id) else self.space_of(slot).floor(epoch_id)

    def _rank(self, slot: int) -> tuple[int, int, int]:
        table = self.versions
        number = self._epochs.bound[table.epochs[slot]].epoch.number
        return number, table.qualities[slot], table.created[slot]

    def _no_longer_idle(self, space: Space, slot: int) -> None:
        nbytes = self.versions.nbytes[slot]
        self.idle_nbytes -= nbytes
        self.idle_versions -= 1
        space.account.idle_nbytes -= nbytes

    def _unstage(self, space: Space, slot: int) -> None:
        key = self.versions.key(slot)
        staged = space.staged[key]
        staged.remove(slot)
        if not staged:
            del space.staged[key]

    def _unlink(self, space: Space, slot: int) -> None:
        table, key = self.versions, self.versions.key(slot)
        head, after = space.heads[key], table.next[slot]
        if head != slot:
            before = next(other for other in self.chain(space, head) if table.next[other] == slot)
            table.next[before] = after
        elif after != NONE:
            space.heads[key] = after
        else:
            del space.heads[key]
            space.horizons.pop(key, None)
            return
        space.horizons[key] = max(space.horizons.get(key, 0), table.retired[slot])

    def _with_idle_ancestors(self, idle: dict[int, None]) -> dict[int, None]:
        """What is met a second time is not climbed from again."""
        used = dict(idle)
        for slot in idle:
            ancestor = self._idle_parent(slot)
            while ancestor != NONE and ancestor not in used and len(used) - len(idle) < _CLIMB_MAX:
                used[ancestor] = None
                ancestor = self._idle_parent(ancestor)
        return used

    def _idle_parent(self, slot: int) -> int:
        table, space = self.versions, self.space_of(slot)
        index = table.chain_indexes[slot]
        if not index:
            return NONE
        parent = space.heads.get(table.parent(slot), NONE)
        while parent != NONE:
            idle = table.states[parent] == _LIVE and not table.pins[parent]
            same_epoch = table.epochs[parent] == table.epochs[slot]
            if idle and same_epoch and table.chain_indexes[parent] == index - 1:
                return parent
            parent = table.next[parent]
        return NONE
