"""The index of one shard: chains, the slots their bytes sit in, and what may be given up for new ones.

    free --stage--> STAGED --publish--> LIVE --retire--> RETIRED --last unpin--> free
                      |                  |    (CORRUPT)           (not pinned: straight to free)
                      +----- drop -------+---- evict (only if not pinned) -----> free

Bytes are budgeted, not slots: blocks of different layouts have different sizes. Chains live under their
namespace: no key of one is ever seen from another. Every step costs O(versions of the key), a handful;
making room is O(evicted). Only letting go may cost more: whoever uses a block uses what it was built on, so
that no idle block ever goes before an idle block built on it, and the idle ancestors of what is let go move
up with it. Each moves once, however many blocks are let go together: 2 to 4 us each, 8 to 16 ms behind 4,095.
Who lets go of a whole chain has nothing above it to move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter

from kvstore.core.chain import NO_CHAIN, Chain, State, Version
from kvstore.core.eviction import Evictables
from kvstore.core.seams import ReplacementPolicy
from kvstore.core.slots import SlotTable
from kvstore.nouns import BlockKey, BlockRef, NamespaceId


class Index:
    def __init__(
        self,
        capacity_nbytes: int,
        slots_max: int,
        make_policy: Callable[[], ReplacementPolicy],
        lag: Callable[[str, int], int],
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.used_nbytes = 0
        self.freed: list[BlockRef] = []  # whose bytes the driver is to discard; it drains the list
        self._chains: dict[NamespaceId, dict[BlockKey, Chain]] = {}
        self._by_slot: dict[int, Version] = {}
        self._slots = SlotTable(slots_max)
        self._evictable = Evictables(make_policy, lag, self._by_slot)

    def chains(self, namespace: NamespaceId) -> dict[BlockKey, Chain]:
        """The namespace's chains by key. Read only, and only until the next change of the index."""
        return self._chains.get(namespace, {})

    def chain(self, namespace: NamespaceId, key: BlockKey) -> Chain:
        return self.chains(namespace).get(key, NO_CHAIN)

    def versions(self) -> Iterator[Version]:
        return iter(self._by_slot.values())

    def __len__(self) -> int:
        return len(self._by_slot)

    def at(self, slot: int, generation: int) -> Version | None:
        """The version a reference of this generation speaks of; None when the slot was reused since."""
        version = self._by_slot.get(slot)
        return version if version is not None and version.ref.generation == generation else None

    def can_make_room(self, nbytes: int) -> bool:
        """Would a frame of `nbytes` fit if all that is idle went?"""
        held_nbytes = self.used_nbytes - self._evictable.nbytes
        has_slot = self._slots.can_allocate(1) or len(self._evictable) > 0
        return has_slot and held_nbytes + nbytes <= self.capacity_nbytes

    def next_victim(self, nbytes: int) -> Version | None:
        """Whom to evict before a frame of `nbytes` fits; None when it fits now."""
        fits = self.used_nbytes + nbytes <= self.capacity_nbytes and self._slots.can_allocate(1)
        return None if fits else self._evictable.victim()

    def take_slot(self, owner: str) -> tuple[int, int]:
        """A free slot and its generation, for the version that is staged next."""
        (slot,) = self._slots.allocate(1, owner)
        return slot, self._slots.generation(slot)

    def stage(self, version: Version) -> None:
        self.used_nbytes += version.nbytes
        chains = self._chains.setdefault(version.namespace, {})
        chains.setdefault(version.key, Chain()).versions.append(version)
        self._by_slot[version.ref.slot] = version

    def publish(self, version: Version, revision: int) -> None:
        """Make a staged version visible from `revision` on. It must be pinned: whoever lets go decides
        what goes first."""
        assert version.pins, "published without a pin"
        version.state = State.LIVE
        version.created = revision

    def retire(self, version: Version, revision: int, into: State = State.RETIRED) -> None:
        """Take a live version out of sight. Its bytes go now, or with its last pin."""
        if not version.pins:
            self._evictable.remove(version)
        version.state = into
        version.retired = revision
        if into is State.CORRUPT:  # older snapshots lose it too, and must not see a lesser one instead
            self.chain(version.namespace, version.key).horizon = revision
        if not version.pins:
            self.drop(version)

    def drop(self, version: Version) -> None:
        """Free the slot and forget the version. It must be staged, or retired and not pinned."""
        chains = self._chains[version.namespace]
        chain = chains[version.key]
        chain.versions.remove(version)
        chain.horizon = max(chain.horizon, version.retired or 0)
        if not chain.versions:
            del chains[version.key]
        if not chains:
            del self._chains[version.namespace]
        del self._by_slot[version.ref.slot]
        self._slots.free([version.ref.slot])
        self.used_nbytes -= version.nbytes
        self.freed.append(version.ref)

    def pin(self, version: Version) -> None:
        if version.state is State.LIVE and not version.pins:
            self._evictable.remove(version)
        version.pins += 1

    def unpin(self, versions: Sequence[Version]) -> None:
        """Take one pin of each, as often as it is named: all of one use, whoever pinned them."""
        idle: dict[int, Version] = {}
        for version in versions:
            version.pins -= 1
            if version.pins:
                continue
            if version.state is State.LIVE:
                idle[version.ref.slot] = version
            elif version.state is not State.STAGED:
                self.drop(version)
        used = self._with_idle_ancestors(idle)
        for version in sorted(used.values(), key=attrgetter("chain_index"), reverse=True):
            if version.ref.slot not in idle:
                self._evictable.remove(version)
            self._evictable.insert(version)

    def check_integrity(self) -> None:
        """Independent walk over chains, slots, policies and bytes."""
        walked = [v for chains in self._chains.values() for chain in chains.values() for v in chain.versions]
        assert {id(v) for v in walked} == {id(v) for v in self._by_slot.values()}, "chains and slots disagree"
        assert sum(v.nbytes for v in walked) == self.used_nbytes, "bytes without a version"
        assert self.used_nbytes <= self.capacity_nbytes, "over capacity"
        self._slots.check_integrity()
        assert self._slots.n_free + len(walked) == len(self._slots), "slots without a version"
        for version in walked:
            assert self._slots.is_current(version.ref.slot, version.ref.generation), (
                "a version without its slot"
            )
        idle = [v for v in walked if v.state is State.LIVE and not v.pins]
        assert len(idle) == len(self._evictable), "policies hold other slots than the idle ones"
        assert sum(v.nbytes for v in idle) == self._evictable.nbytes, "idle bytes are miscounted"

    def _with_idle_ancestors(self, idle: dict[int, Version]) -> dict[int, Version]:
        """By slot. What is met a second time is not climbed from again."""
        used = dict(idle)
        for version in idle.values():
            ancestor = self._idle_parent(version)
            while ancestor is not None and ancestor.ref.slot not in used:  # ends: chain indexes fall
                used[ancestor.ref.slot] = ancestor
                ancestor = self._idle_parent(ancestor)
        return used

    def _idle_parent(self, version: Version) -> Version | None:
        for parent in self.chain(version.namespace, version.parent).versions:
            idle = parent.state is State.LIVE and not parent.pins
            if idle and parent.epoch == version.epoch and parent.chain_index == version.chain_index - 1:
                return parent
        return None
