"""The store as a dict of lists: what the core must do, without slots, heaps, queues or policies.

Everything is scanned. What the model cannot know, which idle block is evicted to make room, it is told
after the fact, and judges: only blocks that nobody held may go, and only when room was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvstore.nouns import BlockRef, Quality

PAUSE_S = 2.0
BLOCK_NBYTES = 100


@dataclass(eq=False)
class Block:
    """One committed version, past or present."""

    key: int
    epoch: int
    quality: Quality
    ref: BlockRef
    created: int
    retired: int | None = None
    corrupt: bool = False
    purged: bool = False
    dead: bool = False  # purged or dropped as a whole while it was pinned: nobody will ever see it
    gone: bool = False  # its bytes are no more
    nbytes: int = BLOCK_NBYTES
    evicted: tuple[int, int] | None = None  # at a revision after the first, at the second at the latest

    @property
    def is_live(self) -> bool:
        return self.retired is None and not self.gone and not self.dead

    def stood_at(self, revision: int, *, surely: bool) -> bool:
        """`surely`: or also if it may have been evicted by then."""
        if self.evicted is not None and self.evicted[0 if surely else 1] <= revision:
            return False
        return self.created <= revision and (self.retired is None or self.retired > revision)


@dataclass(eq=False)
class Lease:
    expires: float
    duration_s: float
    blocks: list[Block]


@dataclass(eq=False)
class Writing:
    """An open transaction: for each offer its key, and the block that exists or whether it is staged."""

    epoch: int
    quality: Quality
    lease: Lease
    keys: list[int]
    exists: dict[int, Block] = field(default_factory=dict)
    staged: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    forbidden: set[int] = field(default_factory=set)  # purged while they were being written


@dataclass(eq=False)
class Moving:
    """A move under way: of `block`, to be another of a lesser quality if it is encoded."""

    block: Block
    lease: Lease
    encoded: bool
    forbidden: bool = False  # purged while it moved


class Model:
    def __init__(
        self, capacity_blocks: int, lies_on_host: Callable[[Block], bool] = lambda block: True
    ) -> None:
        """Where a block lies the model is told, too: bytes are judged by what is stored there."""
        self.capacity_blocks = capacity_blocks
        self.lies_on_host = lies_on_host
        self.moving: dict[object, Moving] = {}
        self.blocks: list[Block] = []  # all that ever were
        self.leases: dict[int, Lease] = {}
        self.writing: dict[int, Writing] = {}
        self.now = 0.0
        self.paused_s = 0.0
        self.current = 1
        self.lag_max = 0
        self.oldest = 0

    @property
    def time(self) -> float:
        return self.now - self.paused_s

    def pins(self) -> Counter[Block]:
        held = [*self.leases.values(), *(w.lease for w in self.writing.values())]
        held += [moving.lease for moving in self.moving.values()]
        return Counter(block for lease in held for block in lease.blocks)

    def has_room(self) -> bool:
        """For one block on the host, if all went there that may: what is not pinned, live or retired, and not
        staged."""
        held = sum(block.nbytes for block in self.pins() if self.lies_on_host(block))
        held += BLOCK_NBYTES * sum(len(w.staged) for w in self.writing.values())
        return held + BLOCK_NBYTES <= self.capacity_blocks * BLOCK_NBYTES

    def best(self, blocks: Iterable[Block], epoch: int, least: Quality) -> Block | None:
        fit = [b for b in blocks if b.epoch == epoch and b.quality >= least]
        return max(fit, key=lambda b: b.quality, default=None)

    def live(self, key: int, epoch: int, least: Quality) -> Block | None:
        return self.best((b for b in self.blocks if b.key == key and b.is_live), epoch, least)

    def seen(self, key: int, epoch: int, least: Quality, lag: int) -> Block | None:
        """The newest epoch within the effective lag, of it the best quality."""
        if epoch < self.oldest:
            return None
        for of in range(epoch, max(self.oldest, epoch - min(lag, self.lag_max)) - 1, -1):
            block = self.live(key, of, least)
            if block is not None:
                return block
        return None

    def kill(self, chosen: Iterable[Block]) -> None:
        """A whole namespace or epoch dies; what is pinned goes with its pins."""
        for block in chosen:
            block.dead = block.dead or block.is_live

    def stood(self, key: int, epoch: int, least: Quality, revision: int) -> list[Block | None]:
        """What a snapshot at the revision saw when it was taken; two answers when nobody can tell."""
        blocks = [b for b in self.blocks if b.key == key and not b.dead]
        return [
            self.best((b for b in blocks if b.stood_at(revision, surely=surely)), epoch, least)
            for surely in (True, False)
        ]

    def is_staged(self, key: int, epoch: int, quality: Quality) -> bool:
        """Is somebody writing something as good?"""
        made = [m.block for m in self.moving.values() if m.encoded and not m.forbidden]
        if quality <= Quality.INT8 and any((b.key, b.epoch) == (key, epoch) for b in made):
            return True
        return any(
            w.keys[i] == key and w.epoch == epoch and w.quality >= quality
            for w in self.writing.values()
            for i in w.staged - w.forbidden
        )

    def reap(self) -> None:
        for table in (self.leases, self.writing):
            for name in [n for n, held in table.items() if _lease(held).expires <= self.time]:
                del table[name]
        for moving in self.moving.values():
            if moving.lease.expires <= self.time:
                moving.lease.blocks.clear()


def _lease(held: Lease | Writing) -> Lease:
    return held if isinstance(held, Lease) else held.lease
