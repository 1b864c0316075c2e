"""Random histories of a tier over a crashing file system, and what they allow to be found after a crash.

Each fact stands with the number of file operations done when it became true, so that one run of a history
answers for a crash at every one of its operations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvstore.nouns import ISOLATE, KVLayout
from kvstore.tiers.base import Place
from kvstore.tiers.durable import AdvanceNote, EpochNote, NamespaceNote, Note, PurgeNote, Recovered
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, block_of, epoch_of, key_of, namespace_of, verified
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline

NEVER: Final = 1 << 60
SIZES: Final = (0, 100, 3_776, 3_777, 5_000, 11_000)  # 3,776 just fill a disk block
DIRECTORY: Final = Path("/disk")
LAYOUT: Final = KVLayout(1, 0, 1, 16, "float32")


def small(directories: int = 1, **settings: object) -> NvmeConfig:
    """Segments of 16 blocks; a disk of 10 of them."""
    given: dict[str, object] = {
        "disk_nbytes": directories * (10 << 16),
        "segment_nbytes": 1 << 16,
        "batch_nbytes": 1 << 14,
        "write_wait_s": 0.05,
        **settings,
    }
    names = tuple(DIRECTORY / str(i) for i in range(directories))
    return NvmeConfig(names, **given)  # type: ignore[arg-type]


@dataclass(slots=True)
class Written:
    """One write of a block, and since which operation what was true of it."""

    block: Block
    begun: int
    kept: int = NEVER
    discarding: int = NEVER
    purging: int = NEVER
    purged: int = NEVER


@dataclass(slots=True)
class Oracle:
    writes: list[Written] = field(default_factory=list)
    notes: list[tuple[int, Note]] = field(default_factory=list)  # since when it is durable

    def after(self, at: int) -> Oracle:
        """What a machine that was stopped there leaves to its next life, whose operations count from 0."""

        def since(operation: int) -> int:
            return 0 if operation <= at else NEVER

        writes = [
            Written(w.block, 0, since(w.kept), since(w.discarding), since(w.purging))
            for w in self.writes
            if w.begun <= at < w.purged
        ]
        return Oracle(writes, [(0, note) for begun, note in self.notes if begun <= at])

    def check(self, found: Recovered, at: int) -> None:
        """Blocks: nothing purged, nothing unknown, all that was kept. Notes: all that were noted."""
        there = set(blocks_of(found))
        assert len(there) == len(found.blocks), "a block twice"
        may = {w.block for w in self.writes if w.begun <= at and w.purged > at}
        must = {w.block for w in self.writes if w.kept <= at and min(w.discarding, w.purging) > at}
        assert there <= may, "a block that was purged or never written"
        assert must <= there, f"{len(must - there)} kept blocks are lost"
        needed = {namespace_of(block.namespace) for block in there | must}
        for since, note in self.notes:
            if isinstance(note, NamespaceNote) and note.id not in needed:
                continue  # forgotten when nothing of it is left
            if since <= at and not isinstance(note, AdvanceNote):
                assert note in found.notes, f"{note} is lost"
        advanced = [n.number for since, n in self.notes if since <= at and isinstance(n, AdvanceNote)]
        known = [n.number for n in found.notes if isinstance(n, AdvanceNote)]
        assert max(known, default=0) >= max(advanced, default=0), "an advance is lost"


def blocks_of(found: Recovered) -> list[Block]:
    return [block_of(block.frame.meta, block.frame.payload_nbytes) for block in found.blocks]


async def adopt_all(tier: NvmeTier, found: Recovered, first_slot: int = 0) -> dict[int, Block]:
    """Adopt and read everything: what recover hands out is there, and is what it says. By slot."""
    adopted: dict[int, Block] = {}
    for slot, block in enumerate(blocks_of(found), first_slot):
        tier.adopt(slot - first_slot, Place(slot, 1))
        frame = await tier.read(Place(slot, 1))
        assert frame is not None, "handed out and not there"
        assert verified(frame) == block
        adopted[slot] = block
    return adopted


class History:
    """One life of a tier that does random things; its facts go to the oracle."""

    def __init__(self, files: CrashFiles, config: NvmeConfig, rng: random.Random, oracle: Oracle) -> None:
        self.files = files
        self.rng = rng
        self.oracle = oracle
        self.tier = NvmeTier(config, files, Inline(), rng.getrandbits)
        self.held: dict[int, Written] = {}  # by slot
        self.unkept: list[Written] = []
        self.slots = 0

    @property
    def now(self) -> int:
        return len(self.files.log)

    async def open(self) -> None:
        found = await self.tier.recover()
        self.oracle.check(found, self.now)
        for slot, block in (await adopt_all(self.tier, found)).items():
            written = next(w for w in reversed(self.oracle.writes) if w.block == block)
            written.kept = min(written.kept, self.now)  # what is handed out stays
            self.held[slot] = written
        self.slots = len(found.blocks)

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self.rng.choices(
                (self.write, self.sync, self.discard, self.purge, self.note, self.reread),
                (60, 8, 14, 3, 2, 4),
            )[0]
            await step()
            while self.tier.nbytes() > self.tier.room_nbytes() * 0.95:
                self.forget(next(iter(self.held)))

    async def write(self) -> None:
        key = self.rng.randrange(400)
        block = Block(key, 1 + key % 7 // 4, key % 5 // 3, nbytes=SIZES[key % len(SIZES)])
        if any(written.block == block for written in self.held.values()):
            return  # the shard never holds a block twice
        written = Written(block, self.now)
        self.oracle.writes.append(written)
        slot, self.slots = self.slots, self.slots + 1
        self.held[slot] = written
        self.unkept.append(written)
        await self.tier.write(Place(slot, 1), block.frame())

    async def sync(self) -> None:
        waiting, self.unkept = self.unkept, []
        await self.tier.sync()
        for written in waiting:
            written.kept = self.now

    async def discard(self) -> None:
        if self.held:
            self.forget(self.rng.choice(list(self.held)))

    def forget(self, slot: int) -> None:
        block = self.held.pop(slot).block
        for written in self.oracle.writes:
            if written.block == block:  # those of earlier lives, too
                written.discarding = min(written.discarding, self.now)
        self.tier.discard(Place(slot, 1))

    async def purge(self) -> None:
        namespace, epoch = self.rng.choice((0, 1)), self.rng.choice((None, None, 1))
        wide = self.rng.random() < 0.3
        keys = None if wide else frozenset(self.rng.sample(range(400), 60))
        dead = [
            w
            for w in self.oracle.writes
            if w.block.namespace == namespace
            and epoch in (None, w.block.epoch)
            and (keys is None or w.block.key in keys)
            and w.purging == NEVER
        ]
        for written in dead:
            written.purging = self.now
        scope = None if keys is None else tuple(map(key_of, sorted(keys)))
        await self.tier.note(PurgeNote(namespace_of(namespace), scope, epoch))
        for written in dead:
            written.purged = self.now
        for slot in [slot for slot, written in self.held.items() if written in dead]:
            self.forget(slot)

    async def note(self) -> None:
        told = [note for _, note in self.oracle.notes if isinstance(note, AdvanceNote)]
        advanced = max((note.number for note in told), default=0)
        number = self.rng.randrange(1, 6)
        note: Note = self.rng.choice(
            (
                NamespaceNote(namespace_of(number), f"model-{number}", "tenant", LAYOUT),
                EpochNote("model", epoch_of(number)),
                AdvanceNote("model", 1 + advanced, ISOLATE),
            )
        )
        await self.tier.note(note)
        self.oracle.notes.append((self.now, note))

    async def reread(self) -> None:
        if self.held:
            slot, written = self.rng.choice(list(self.held.items()))
            frame = await self.tier.read(Place(slot, 1))
            assert frame is not None
            assert verified(frame) == written.block
