"""The versions of one shard, in packed columns: one entry a slot.

An object a version would cost a kilobyte each and, a million of them, half a second of every full garbage
collection. Here a version is about 170 bytes that no collector looks at, and its slot number is its name.
`Version` is a row of the table as a value: for whoever is not in a hurry.

A slot's generation grows with every use, so a reference taken of an earlier one is told from the current.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from kvstore.errors import OverLimit
from kvstore.nouns import (
    KEY_NBYTES,
    BlockKey,
    BlockMeta,
    BlockRef,
    Epoch,
    LayoutFingerprint,
    NamespaceId,
    Quality,
    Tier,
)

NONE: Final = -1
"""No slot."""
WRITTEN, FORBIDDEN, UNFIT = 1, 2, 4
"""Flags of a version: its whole frame is stored; it was purged by its key, or while it was being written; the
tier below cannot make its own of it."""
ON_HOST, ON_NVME, TO_HOST, TO_NVME = 1, 2, 4, 8
"""Residences of a version: where its frame lies (or, staged, is to lie); where a copy is on its way to."""
_FASTEST: Final = bytes(
    Tier.HOST if flags & ON_HOST else Tier.NVME if flags & ON_NVME else 0 for flags in range(16)
)


class State(enum.IntEnum):
    FREE = 0
    STAGED = 1  # being written by one transaction, invisible to all others
    LIVE = 2  # committed
    RETIRED = 3  # no longer visible at latest; its bytes stay while it is pinned
    GONE = 4  # retired because it was purged, or its bytes are not what was stored: no snapshot sees it


class Version(NamedTuple):
    """One row: what the shard knows of one (key, epoch, quality)."""

    namespace: NamespaceId
    key: BlockKey
    parent: BlockKey
    chain_index: int
    placement: BlockKey
    epoch: Epoch
    quality: Quality
    ref: BlockRef
    nbytes: int  # of the whole frame
    tier: Tier
    state: State
    created: int  # revision counter of the commit; 0 while it is staged
    retired: int  # 0: it is not
    written: bool  # the whole frame arrived and was verified
    pins: int  # by how many leases it is held

    def meta(self, fingerprint: LayoutFingerprint) -> BlockMeta:
        """What its frame must say of itself."""
        return BlockMeta(
            self.namespace,
            self.key,
            self.parent,
            self.chain_index,
            self.placement,
            self.epoch,
            self.quality,
            fingerprint,
        )


class Versions:
    """Columns. `epochs` holds ids of the epoch table, `spaces` positions of the namespaces.

    `next` links the versions of one key, the newest epoch and best quality first. `tiers` is the fastest of a
    version's residences.
    """

    __slots__ = (
        "_free", "_slots_max",
        "chain_indexes", "created", "epochs", "generations", "keys", "nbytes", "next", "parents", "pins",
        "placements", "qualities", "residences", "retired", "spaces", "states", "tiers", "written",
    )  # fmt: skip

    def __init__(self, slots_max: int) -> None:
        self._slots_max = slots_max
        self._free = array("I")
        self.keys, self.parents, self.placements = bytearray(), bytearray(), bytearray()
        self.states, self.tiers, self.residences, self.written = (bytearray() for _ in range(4))
        self.spaces, self.qualities = array("H"), array("H")
        self.epochs, self.chain_indexes, self.pins = array("I"), array("I"), array("I")
        self.next = array("i")
        self.generations, self.nbytes, self.created, self.retired = (array("Q") for _ in range(4))

    def __len__(self) -> int:
        """Slots in use."""
        return len(self.states) - len(self._free)

    @property
    def n_slots(self) -> int:
        """Slots that were ever used: all there is to walk over."""
        return len(self.states)

    def has_room(self) -> bool:
        return len(self) < self._slots_max

    def take(self) -> int:
        """A free slot, all zeros but for its generation. Raises OverLimit."""
        if self._free:
            return self._free.pop()
        slot = len(self.states)
        if slot >= self._slots_max:
            raise OverLimit(f"all {self._slots_max} slots of this shard are in use: raise slots_max")
        for keys in (self.keys, self.parents, self.placements):
            keys.extend(bytes(KEY_NBYTES))
        for flags in (self.states, self.tiers, self.residences, self.written):
            flags.append(0)
        for column in (
            self.spaces, self.qualities, self.epochs, self.chain_indexes, self.pins,
            self.nbytes, self.created, self.retired,
        ):  # fmt: skip
            column.append(0)
        self.generations.append(1)  # 0 is no generation: a zeroed reference is never current
        self.next.append(NONE)
        return slot

    def reside(self, slot: int, residences: int) -> None:
        self.residences[slot] = residences
        self.tiers[slot] = _FASTEST[residences]

    def give_back(self, slot: int) -> None:
        self.states[slot] = State.FREE
        self.written[slot] = 0
        self.created[slot] = self.retired[slot] = 0
        self.next[slot] = NONE
        self.generations[slot] += 1
        self._free.append(slot)

    def is_current(self, slot: int, generation: int) -> bool:
        return (
            0 <= slot < len(self.states)
            and self.generations[slot] == generation
            and self.states[slot] != State.FREE
        )

    def key(self, slot: int) -> BlockKey:
        return BlockKey(bytes(self.keys[slot * KEY_NBYTES : (slot + 1) * KEY_NBYTES]))

    def parent(self, slot: int) -> BlockKey:
        return BlockKey(bytes(self.parents[slot * KEY_NBYTES : (slot + 1) * KEY_NBYTES]))

    def placement(self, slot: int) -> BlockKey:
        return BlockKey(bytes(self.placements[slot * KEY_NBYTES : (slot + 1) * KEY_NBYTES]))

    def name(self, slot: int, key: BlockKey, parent: BlockKey, placement: BlockKey) -> None:
        at = slice(slot * KEY_NBYTES, (slot + 1) * KEY_NBYTES)
        self.keys[at], self.parents[at], self.placements[at] = key, parent, placement

    def stands_at(self, slot: int, counter: int) -> bool:
        """Created at or before the revision and not retired at or before it."""
        retired = self.retired[slot]
        return self.created[slot] <= counter and (not retired or retired > counter)

    def free_slots(self) -> list[int]:
        return list(self._free)


def gather(column: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
    """The column's entries of these slots, at the speed of C."""
    if len(slots) < 2:
        return [column[slot] for slot in slots]
    return itemgetter(*slots)(column)  # type: ignore[no-any-return]
