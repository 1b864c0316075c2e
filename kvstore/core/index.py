"""The index of one shard: chains, the slots their bytes sit in, and what may be given up for new ones.

    free --stage--> STAGED --publish--> LIVE --retire--> RETIRED --last unpin--> free
                      |                  |                  (unpinned: straight to free)
                      +----- drop -------+---- evict (unpinned only) -----------> free

Bytes are budgeted, not slots: blocks of different layouts have different sizes. Cost of every step is
O(chain) with a handful of versions a chain; making room is O(evicted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvstore.core.chain import State, Version
from kvstore.core.seams import ReplacementPolicy
from kvstore.core.slots import SlotTable
from kvstore.nouns import BlockKey, LeaseId


class Index:
    def __init__(
        self, capacity_nbytes: int, slots_max: int, make_policy: Callable[[], ReplacementPolicy]
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.used_nbytes = 0
        self.freed: list[int] = []  # slots whose bytes the driver may discard; it drains the list
        self._chains: dict[BlockKey, list[Version]] = {}
        self._by_slot: dict[int, Version] = {}
        self._slots = SlotTable(slots_max)
        self._make_policy = make_policy
        self._evictable: dict[tuple[str, int], ReplacementPolicy] = {}
        self._current: dict[str, int] = {}

    def chain(self, key: BlockKey) -> list[Version]:
        return self._chains.get(key, [])

    def versions(self) -> Iterator[Version]:
        return iter(self._by_slot.values())

    def __len__(self) -> int:
        return len(self._by_slot)

    def at(self, slot: int, generation: int) -> Version | None:
        """The version a reference of this generation speaks of; None when the slot was reused since."""
        version = self._by_slot.get(slot)
        return version if version is not None and version.generation == generation else None

    def set_current(self, model_id: str, epoch_number: int) -> None:
        """Versions of the model's other epochs become the first victims. O(1)."""
        self._current[model_id] = epoch_number

    def make_room(self, nbytes: int, evicted: Callable[[Version], None]) -> bool:
        """Evict until a frame of `nbytes` fits. False, after evicting what it could, when it cannot."""
        while self.used_nbytes + nbytes > self.capacity_nbytes or not self._slots.can_allocate(1):
            victim = self._victim()
            if victim is None:
                return False
            evicted(victim)
        return True

    def stage(self, version: Version, owner: str) -> None:
        """Give a new version a slot. `make_room` must have said yes."""
        (version.slot,) = self._slots.allocate(1, owner)
        version.generation = self._slots.generation(version.slot)
        self.used_nbytes += version.nbytes
        self._chains.setdefault(version.key, []).append(version)
        self._by_slot[version.slot] = version

    def publish(self, version: Version, revision: int) -> None:
        version.state = State.LIVE
        version.created = revision
        self._offer_up(version)

    def retire(self, version: Version, revision: int) -> None:
        """Take a live version out of sight. Its bytes go now, or with its last pin."""
        if not version.pins:
            self._policy(version).remove(version.slot)
        version.state = State.RETIRED
        version.retired = revision
        if not version.pins:
            self.drop(version)

    def drop(self, version: Version) -> None:
        """Free the slot and forget the version. It must not be in a policy."""
        chain = self._chains[version.key]
        chain.remove(version)
        if not chain:
            del self._chains[version.key]
        del self._by_slot[version.slot]
        self._slots.free([version.slot])
        self.used_nbytes -= version.nbytes
        self.freed.append(version.slot)

    def pin(self, version: Version, lease: LeaseId) -> None:
        if version.state is State.LIVE and not version.pins:
            self._policy(version).remove(version.slot)
        version.pins.add(lease)

    def unpin(self, version: Version, lease: LeaseId) -> None:
        version.pins.discard(lease)
        if version.pins:
            return
        if version.state is State.LIVE:
            self._offer_up(version)
        elif version.state is State.RETIRED:
            self.drop(version)

    def check_integrity(self) -> None:
        """Independent walk over chains, slots, policies and bytes."""
        walked = [version for chain in self._chains.values() for version in chain]
        assert {id(v) for v in walked} == {id(v) for v in self._by_slot.values()}, "chains and slots disagree"
        assert sum(v.nbytes for v in walked) == self.used_nbytes, "bytes without a version"
        assert self.used_nbytes <= self.capacity_nbytes, "over capacity"
        self._slots.check_integrity()
        assert self._slots.n_free + len(walked) == len(self._slots), "slots without a version"
        idle = sum(v.state is State.LIVE and not v.pins for v in walked)
        assert idle == sum(len(p) for p in self._evictable.values()), (
            "policies hold other slots than the idle ones"
        )

    def _offer_up(self, version: Version) -> None:
        if not version.pins:
            self._policy(version).insert(version.slot)

    def _policy(self, version: Version) -> ReplacementPolicy:
        key = (version.model_id, version.epoch.number)
        if key not in self._evictable:
            self._evictable[key] = self._make_policy()
        return self._evictable[key]

    def _victim(self) -> Version | None:
        """The next to go: versions of epochs that are not current first, oldest epoch first."""
        held = [
            (self._is_current(key), key[1], policy) for key, policy in self._evictable.items() if len(policy)
        ]
        if not held:
            return None
        slot = min(held, key=lambda entry: entry[:2])[2].victim()
        return None if slot is None else self._by_slot[slot]

    def _is_current(self, key: tuple[str, int]) -> bool:
        return self._current.get(key[0], key[1]) == key[1]
