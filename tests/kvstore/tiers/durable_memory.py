"""A durable tier in memory, for tests: a disk that outlives its tiers, and fails when it is told to.

The disk keeps frames and notes in one order, each synced or not. `crash` begins another life: what was not
synced is there, torn or lost, by a seeded choice. A tier is one life's view of the disk; one of a past life
changes nothing any more. What is discarded lies about on the disk until it is reclaimed at some sync, as on
a real one, so a recovery may find it again.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvstore.errors import CorruptBlock
from kvstore.frame import decode_header
from kvstore.nouns import BlockMeta, Tier
from kvstore.tiers.base import Place
from kvstore.tiers.durable import Note, PurgeNote, Recovered, RecoveredBlock


@dataclass(slots=True, eq=False)
class Stored:
    """A frame or a note in the disk's order."""

    number: int
    what: bytearray | Note
    synced: bool = False
    wanted: bool = True  # False: discarded, and not yet reclaimed


@dataclass(slots=True)
class Disk:
    """What outlives a shard. `failures`: how many of the next operations of a kind fail."""

    seed: int = 0
    life: int = 0
    stored: list[Stored] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    _numbers: int = 0
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def add(self, what: bytearray | Note) -> Stored:
        self._numbers += 1
        stored = Stored(self._numbers, what)
        self.stored.append(stored)
        return stored

    def crash(self) -> None:
        """Power is lost and comes back."""
        self.life += 1
        kept = []
        for one in self.stored:
            if not one.synced:
                self.met["unsynced at a crash"] += 1
                if self._rng.random() < 0.5:
                    continue
                if isinstance(one.what, bytearray) and self._rng.random() < 0.3:
                    self.met["torn"] += 1
                    del one.what[self._rng.randrange(len(one.what)) :]
            one.synced = True  # what is there now stays
            kept.append(one)
        self.stored = kept

    def reclaim(self, share: float) -> None:
        """Overwrite some of what nobody wants any more."""
        self.stored = [one for one in self.stored if one.wanted or self._rng.random() > share]

    def fails(self, what: str) -> bool:
        if not self.failures[what]:
            return False
        self.failures[what] -= 1
        self.met[f"failed {what}"] += 1
        return True


class DurableMemory:
    """One life's tier. `wait` is called within each operation, by its name: time passes, or it raises."""

    tier = Tier.NVME

    def __init__(
        self,
        disk: Disk,
        room_nbytes: int = 1 << 30,
        wait: Callable[[str], Awaitable[None]] | None = None,
        reclaimed: float = 0.5,
    ) -> None:
        self.disk = disk
        self._room_nbytes = room_nbytes
        self._wait = wait
        self._reclaimed = reclaimed
        self._life = disk.life
        self._places: dict[int, tuple[int, Stored]] = {}
        self._found: dict[int, Stored] = {}  # not adopted yet
        self.closed = False

    # -- storage -----------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    def give_up(self, frame: memoryview) -> None:
        """Memory, no more."""

    async def write(self, place: Place, frame: memoryview) -> None:
        for dead in self._found.values():  # what was not adopted by now never will be
            dead.wanted = False
        self._found.clear()
        stored = self.disk.add(bytearray(frame))  # its place in the order is that of the call
        kept = self._places.get(place.slot)
        if kept is None or kept[0] < place.generation:
            self._places[place.slot] = place.generation, stored
        await self._operate("write")

    async def read(self, place: Place) -> memoryview | None:
        await self._operate("read")
        stored = self._at(place)
        copy = None if stored is None else memoryview(bytearray(frame_of(stored)))
        await self._operate("read")
        return copy

    async def borrow(self, place: Place) -> memoryview | None:
        return await self.read(place)

    def give_back(self, frame: memoryview) -> None:
        """It was a copy."""

    def discard(self, place: Place) -> None:
        stored = self._at(place)
        if stored is not None:
            del self._places[place.slot]
            stored.wanted = stored.wanted and self._life != self.disk.life

    def leave(self, place: Place) -> None:
        self.discard(place)

    async def sync(self) -> None:
        """Raises OSError, and has then forgotten what was not synced before."""
        waiting = [one for one in self.disk.stored if not one.synced and isinstance(one.what, bytearray)]
        try:
            await self._operate("sync")
        except OSError:
            forgotten = {id(one) for one in self.disk.stored if not one.synced}
            self._places = {slot: kept for slot, kept in self._places.items() if id(kept[1]) not in forgotten}
            raise
        for one in waiting:
            one.synced = True
        self.disk.reclaim(self._reclaimed)

    def nbytes(self) -> int:
        return sum(len(frame_of(stored)) for _, stored in self._places.values())

    def flip_byte(self, place: Place, offset: int) -> bool:
        stored = self._at(place)
        if stored is not None:
            frame_of(stored)[offset] ^= 1
        return stored is not None

    # -- what survives -----------------------------------------------------------------------------

    async def recover(self) -> Recovered:
        await self._operate("recover")
        counters: Counter[str] = Counter()
        notes = [one for one in self.disk.stored if not isinstance(one.what, bytearray)]
        purges = [(one.number, one.what) for one in notes if isinstance(one.what, PurgeNote)]
        blocks = []
        for one in self.disk.stored:
            if not isinstance(one.what, bytearray):
                continue
            try:
                frame = decode_header(memoryview(one.what))
            except CorruptBlock:
                counters["torn"] += 1
                continue
            if len(one.what) != frame.payload_nbytes + 256:
                counters["torn"] += 1
            elif any(number > one.number and covers(purge, frame.meta) for number, purge in purges):
                counters["purged"] += 1
            else:
                self._found[one.number] = one
                blocks.append(RecoveredBlock(one.number, frame, len(one.what)))
        self.disk.met.update(counters)
        lasting = [one.what for one in notes if not isinstance(one.what, PurgeNote | bytearray)]
        return Recovered(lasting, blocks, dict(counters))

    def adopt(self, record: int, place: Place) -> None:
        stored = self._found.pop(record)
        stored.wanted = True
        self._places[place.slot] = place.generation, stored

    async def note(self, note: Note) -> None:
        stored = self.disk.add(note)
        await self._operate("note")
        stored.synced = True

    def room_nbytes(self) -> int:
        return self._room_nbytes

    async def close(self) -> None:
        self.closed = True

    # -- inside ------------------------------------------------------------------------------------

    def _at(self, place: Place) -> Stored | None:
        generation, stored = self._places.get(place.slot, (0, None))
        return stored if generation == place.generation else None

    async def _operate(self, what: str) -> None:
        if self._wait is not None:
            await self._wait(what)
        else:
            await asyncio.sleep(0)
        if self._life != self.disk.life:
            raise OSError(errno.ENODEV, "of a past life")
        if self.disk.fails(what):
            raise OSError(errno.EIO, f"{what} failed")


def covers(purge: PurgeNote, meta: BlockMeta) -> bool:
    of_all = purge.keys is None or meta.key in purge.keys
    return purge.namespace == meta.namespace and of_all and purge.epoch in (None, meta.epoch.number)


def frame_of(stored: Stored) -> bytearray:
    assert isinstance(stored.what, bytearray), "a place that holds a note"
    return stored.what
