"""The index of one shard: chains, the slots their bytes sit in, and what may be given up for new ones.

    free --stage--> STAGED --publish--> LIVE --retire--> RETIRED --last unpin--> free
                      |                  |     (GONE)            (not pinned: straight to free)
                      +----- drop -------+---- evict (only if not pinned) -----> free

Bytes are budgeted, not slots: blocks of different layouts have different sizes. Every step costs O(versions
of the key), a handful; making room is O(evicted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvstore.core.epochs import EpochTable
from kvstore.core.eviction import Evictables
from kvstore.core.kept import Kept
from kvstore.core.leases import LeaseTable
from kvstore.core.retention import Retention, Retentions
from kvstore.core.rooms import Freed, Room, Rooms
from kvstore.core.seams import MakePolicy
from kvstore.core.spaces import Account, Space
from kvstore.core.state import CoreConfig, Namespace, Offer
from kvstore.core.uses import Use, Uses
from kvstore.core.versions import (
    NONE,
    ON_HOST,
    ON_NVME,
    TO_HOST,
    TO_NVME,
    WRITTEN,
    State,
    Version,
    Versions,
    gather,
)
from kvstore.errors import NotFound
from kvstore.nouns import BlockRef, NamespaceId, Quality, Tier

_LIVE, _STAGED = int(State.LIVE), int(State.STAGED)
_UNLIMITED = 1 << 63


class Index:
    def __init__(
        self, config: CoreConfig, make_policy: MakePolicy, epochs: EpochTable, leases: LeaseTable
    ) -> None:
        self.versions = table = Versions(config.limits.slots_max)
        self.spaces: dict[NamespaceId, Space] = {}
        self.by_index: list[Space] = []
        self.accounts: dict[str, Account] = {}
        self.freed: list[Freed] = []  # what the driver is to discard; it drains the list
        self.uses = Uses(table)
        self.retentions = Retentions()
        self.kept = Kept(table, int(config.foresight.keeps_share * config.capacity_nbytes))
        queues = [
            Evictables(make_policy, epochs, table, self.uses, self.retentions, self._tenant_of, self.kept)
            for _ in range(2)
        ]
        self.host = Room(Tier.HOST, ON_HOST, TO_HOST, config.capacity_nbytes, queues[0])
        self.nvme = Room(Tier.NVME, ON_NVME, TO_NVME, config.tiering.nvme_nbytes, queues[1])
        self.rooms = Rooms(self.host, self.nvme, table, leases)
        self.on_use: Callable[[Use], None] | None = None  # told of each use after it is recorded
        self._time = leases
        self._epochs = epochs
        self._config = config

    def __len__(self) -> int:
        return len(self.versions)

    @property
    def now(self) -> float:
        """Seconds, on the core's own time, which leaves out its pauses."""
        return self._time.now

    @property
    def held_nbytes(self) -> int:
        """On all tiers."""
        return self.host.used_nbytes + self.nvme.used_nbytes

    def open(self, namespace_id: NamespaceId, namespace: Namespace) -> Space:
        space = self.spaces.get(namespace_id)
        if space is None:
            tenant = namespace.tenant
            quota = self._config.quotas.get(tenant, _UNLIMITED)
            account = self.accounts.setdefault(tenant, Account(tenant, quota))
            space = self.spaces[namespace_id] = Space(namespace_id, len(self.by_index), namespace, account)
            self.by_index.append(space)
        return space

    def space(self, namespace_id: NamespaceId) -> Space:
        """Raises NotFound: the shard restarted since, open it again."""
        space = self.spaces.get(namespace_id)
        if space is None:
            shard = self._config.shard
            raise NotFound(f"namespace {namespace_id.hex()} is not open on {shard}: open it first")
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

    # -- a version's life --------------------------------------------------------------------------

    def stage(self, space: Space, epoch_id: int, quality: Quality, offer: Offer, room: Room) -> int:
        table, slot = self.versions, self.versions.take()
        table.name(slot, offer.key, offer.parent, offer.placement)
        table.states[slot], table.nbytes[slot] = _STAGED, offer.nbytes
        table.spaces[slot], table.epochs[slot] = space.index, epoch_id
        table.qualities[slot], table.chain_indexes[slot] = quality, offer.chain_index
        self.retentions.put(slot, offer.retention)
        space.staged.setdefault(offer.key, []).append(slot)
        self.occupy(slot, room, room.held)
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
        self.uses.born(slot, self._parent(slot), self.now)
        for room in self.rooms:
            if room.capacity_nbytes:  # else nothing ever lies there, and columns cost memory
                room.evictables.born(slot)
            if table.residences[slot] & room.held:
                room.evictables.enter(slot)

    def retire(self, slot: int, revision: int, into: State = State.RETIRED) -> None:
        """Take a live version out of sight. Its bytes go now, or with its last pin."""
        table, space = self.versions, self.space_of(slot)
        table.states[slot], table.retired[slot] = into, revision
        if into is State.GONE:  # older snapshots lose it too, and must not see a lesser one instead
            space.horizons[table.key(slot)] = revision
        if table.pins[slot]:
            for room in self.rooms:
                room.evictables.forget(space.account.tenant, slot)
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
        for room in self.rooms:
            room.evictables.forget(space.account.tenant, slot)  # it may have been pinned where it stood
            self._vacate(slot, room, lives_on=False)
        self.retentions.put(slot, None)
        table.give_back(slot)

    def retain(self, slot: int, retention: Retention) -> None:
        """From now on this is what a live version is worth, wherever it lies."""
        self.retentions.put(slot, retention)
        for room in self._rooms_of(slot):
            room.evictables.retained(slot)

    def occupy(self, slot: int, room: Room, flag: int) -> None:
        """The version takes its bytes of a tier: it lies there (room.held), or is to come (room.coming)."""
        table = self.versions
        table.reside(slot, table.residences[slot] | flag)
        room.used_nbytes += table.nbytes[slot]
        if room is self.host:
            self.space_of(slot).account.used_nbytes += table.nbytes[slot]

    def arrive(self, slot: int, room: Room) -> None:
        """What was on its way to a tier lies there now. It is pinned by who brought it."""
        table = self.versions
        assert table.pins[slot], "arrived without a pin"
        table.reside(slot, table.residences[slot] & ~room.coming | room.held)
        room.evictables.enter(slot)

    def leave(self, slot: int, room: Room) -> None:
        """The version lives on without what a tier holds of it, or was to hold."""
        space = self.space_of(slot)
        room.evictables.forget(space.account.tenant, slot)
        if room is self.host and self.versions.states[slot] == _LIVE and not self.versions.pins[slot]:
            self._no_longer_idle(space, slot)
        self._vacate(slot, room, lives_on=True)

    def pin(self, space: Space, slots: Sequence[int]) -> None:
        """Hold live or staged versions of one namespace."""
        table, idle, found = self.versions, 0, 0
        pins, nbytes, states, residences = table.pins, table.nbytes, table.states, table.residences
        for slot in slots:
            held = pins[slot]
            if not held and states[slot] == _LIVE and residences[slot] & ON_HOST:
                idle += nbytes[slot]
                found += 1
            pins[slot] = held + 1
        self.rooms.idle_nbytes -= idle
        self.rooms.idle_versions -= found
        space.account.idle_nbytes -= idle

    def unpin(self, slots: Sequence[int], *, used: bool = True) -> None:
        """Take one pin of each, as often as it is named: all of one use, whoever pinned them.

        What was not used, only held, keeps its place in the order of those who are to go.
        """
        table = self.versions
        pins, states, spaces, epochs, created = (
            table.pins, table.states, table.spaces, table.epochs, table.created,
        )  # fmt: skip
        of, floor = (-1, -1), 0  # of which namespace and epoch the floor is: nearly always of all slots
        by_epoch: dict[tuple[int, int], list[int]] = {}
        idle: list[int] = []
        for slot in slots:
            held = pins[slot] - 1
            pins[slot] = held
            state = states[slot]
            if held or state == _STAGED:
                continue
            if of != (spaces[slot], epochs[slot]):
                of = spaces[slot], epochs[slot]
                floor, idle = self._floor(slot), by_epoch.setdefault(of, [])
            if state == _LIVE and created[slot] > floor:
                idle.append(slot)
            else:
                self.drop(slot)
        for (space_index, _), idle in by_epoch.items():
            if not idle:
                continue
            account = self.by_index[space_index].account
            self._now_idle(account, idle)
            if used:
                self._used(account.tenant, idle)
            else:
                for slot in idle:
                    for room in self._rooms_of(slot):
                        room.evictables.let_go(account.tenant, slot)

    def is_live(self, slot: int) -> bool:
        return self.versions.states[slot] == _LIVE and not self.is_dead(slot)

    def is_purged(self, slot: int) -> bool:
        """As part of a namespace or an epoch, not by its key: it stands in the table until it is swept."""
        return self.versions.created[slot] <= self.space_of(slot).floor(self.versions.epochs[slot])

    def is_dead(self, slot: int) -> bool:
        """Live by its state, yet purged, or of an epoch that was dropped: nobody will ever see it."""
        return self.versions.created[slot] <= self._floor(slot)

    def chain(self, space: Space, head: int) -> Iterator[int]:
        """The slots of a chain, from its head on."""
        while head != NONE:
            yield head
            head = self.versions.next[head]

    # -- inside ------------------------------------------------------------------------------------

    def _tenant_of(self, slot: int) -> str:
        return self.space_of(slot).account.tenant

    def _floor(self, slot: int) -> int:
        """Revision up to which everything of the slot's namespace and epoch is dead."""
        epoch_id = self.versions.epochs[slot]
        return _UNLIMITED if self._epochs.is_dropped(epoch_id) else self.space_of(slot).floor(epoch_id)

    def _rank(self, slot: int) -> tuple[int, int, int]:
        table = self.versions
        epoch = self._epochs.bound[table.epochs[slot]].epoch
        return epoch.number, table.qualities[slot], table.created[slot]

    def _on_host(self, slots: Sequence[int]) -> Sequence[int]:
        if not self.nvme.capacity_nbytes:
            return slots
        residences = self.versions.residences
        return [slot for slot in slots if residences[slot] & ON_HOST]

    def _rooms_of(self, slot: int) -> list[Room]:
        return [room for room in self.rooms if self.versions.residences[slot] & room.held]

    def _now_idle(self, account: Account, slots: Sequence[int]) -> None:
        slots = self._on_host(slots)
        nbytes = sum(gather(self.versions.nbytes, slots))
        self.rooms.idle_nbytes += nbytes
        account.idle_nbytes += nbytes
        self.rooms.idle_versions += len(slots)

    def _no_longer_idle(self, space: Space, slot: int) -> None:
        if self.versions.residences[slot] & ON_HOST:
            nbytes = self.versions.nbytes[slot]
            self.rooms.idle_nbytes -= nbytes
            self.rooms.idle_versions -= 1
            space.account.idle_nbytes -= nbytes

    def _vacate(self, slot: int, room: Room, *, lives_on: bool) -> None:
        table = self.versions
        if table.residences[slot] & (room.held | room.coming):
            table.reside(slot, table.residences[slot] & ~(room.held | room.coming))
            room.used_nbytes -= table.nbytes[slot]
            if room is self.host:
                self.space_of(slot).account.used_nbytes -= table.nbytes[slot]
            self.freed.append(Freed(self.ref(slot), room.tier, lives_on))

    def _unstage(self, space: Space, slot: int) -> None:
        key = self.versions.key(slot)
        space.staged[key].remove(slot)
        if not space.staged[key]:
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

    def _used(self, tenant: str, idle: list[int]) -> None:
        """One use, of one namespace and epoch: all of it is idle now, wherever it lies."""
        idle.sort(key=self.versions.chain_indexes.__getitem__, reverse=True)
        use = self.uses.of(idle, self.now)
        if on_host := self._on_host(idle):
            self.host.evictables.use(tenant, use._replace(slots=on_host))
        if self.nvme.capacity_nbytes:
            residences = self.versions.residences
            if below := [slot for slot in idle if residences[slot] & ON_NVME]:
                self.nvme.evictables.use(tenant, use._replace(slots=below))
        self.uses.record(use)
        if self.on_use is not None:
            self.on_use(use)

    def _parent(self, slot: int) -> int:
        """The live version of the same epoch this one was built on, of its own quality first; or NONE."""
        table, space = self.versions, self.space_of(slot)
        index, found = table.chain_indexes[slot], NONE
        if not index:
            return NONE
        for parent in self.chain(space, space.heads.get(table.parent(slot), NONE)):
            same_epoch = table.epochs[parent] == table.epochs[slot]
            if same_epoch and table.states[parent] == _LIVE and table.chain_indexes[parent] == index - 1:
                if table.qualities[parent] == table.qualities[slot]:
                    return parent
                found = parent if found == NONE else found
        return found
