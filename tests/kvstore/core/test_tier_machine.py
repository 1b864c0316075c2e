"""The core's machine over two tiers: moves begin, are written, end and fail between all other rules.

What the model cannot know, who goes and what is worth moving, it is told and judges. A disk keeps frames in
the order they were written, each surely (its move ended) or perhaps (it failed, or was given up since), and
purges in the same order: after a crash the core must hold what surely was kept, and nothing that was purged.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kvstore.core.moves import Move
from kvstore.core.rooms import Freed
from kvstore.core.state import DemoteWhen, Encoding, Tiering
from kvstore.core.versions import ON_NVME
from kvstore.nouns import (
    ROOT_KEY,
    BlockMeta,
    EpochPolicy,
    Incarnation,
    KVLayout,
    LeaseId,
    Quality,
    Tier,
)
from tests.kvstore.core.conftest import INT8, LAYOUT, LOSSLESS, MODEL, NAMESPACE, NBYTES, Shard, epoch
from tests.kvstore.core.conftest import key as key_of
from tests.kvstore.core.judged import CAPACITY_BLOCKS
from tests.kvstore.core.model import PAUSE_S, Block, Lease, Moving
from tests.kvstore.core.test_machine import (
    CoreMachine,
    chains,
    epochs,
    leases,
    payload,
    picks,
    policies,
    qualities,
)

ENCODED_NBYTES = NBYTES // 2
MOVE_LEASE_S = 6.0


def encoding(_layout: KVLayout) -> Encoding:
    return Encoding(INT8, ENCODED_NBYTES)


@dataclass(eq=False)
class Frame:
    """On the disk, in its order."""

    order: int
    key: int
    epoch: int
    quality: Quality
    nbytes: int
    surely: bool = False


class TierMachine(CoreMachine):
    tiering = Tiering(nvme_nbytes=4 * NBYTES)

    @initialize(
        blocks=st.sampled_from([3, 12]),
        when=st.sampled_from(DemoteWhen),
        exclusive=st.booleans(),
        lossy=st.booleans(),
        queue=st.sampled_from([2, 100]),
    )
    def configure(self, blocks: int, when: DemoteWhen, exclusive: bool, lossy: bool, queue: int) -> None:
        encode = encoding if lossy else None
        self.tiering = Tiering(blocks * NBYTES, when, exclusive, encode, (0.6, 0.3), queue * NBYTES)
        self.start()

    def start(self) -> None:
        self.moves: list[Move] = []
        self.written: dict[Move, Frame] = {}
        if self.lives == 0:
            self.disk: list[Frame] = []
            self.placed: dict[tuple[int, int], Frame] = {}
            self.purges: list[tuple[int, set[int] | None, int | None]] = []
            self.advances: list[tuple[int, EpochPolicy]] = []
            self.order = 0
        super().start()

    def make_shard(self, incarnation: Incarnation) -> Shard:
        return Shard(
            CAPACITY_BLOCKS, incarnation=incarnation, tiering=self.tiering, pause_s=PAUSE_S, slots_max=64
        )

    def discard(self, freed: Freed) -> None:
        super().discard(freed)
        if freed.tier is Tier.NVME:
            frame = self.placed.pop((freed.ref.slot, freed.ref.generation), None)
            if frame is not None:
                frame.surely = False

    # -- what gives the rest something to meet -----------------------------------------------------

    restart = pause = refuse = renew = compact = start_writing = None  # type: ignore[assignment]
    """Rules of the machine above that say nothing new here."""

    @rule(keys=chains, of=st.integers(1, 2), quality=qualities, moved=st.integers(0, 4))
    def fill(self, keys: list[int], of: int, quality: Quality, moved: int) -> None:
        """A chain is written and let go of, and so many of the moves that it leads to stand."""
        self.put(keys, of, quality, None, None)
        self.what_was_freed_is_discarded()
        self.start_moves(4)
        for _ in range(moved):
            if self.moves:
                self.what_was_freed_is_discarded()
                self.finish_move(0)

    @precondition(lambda self: any(b.is_live for b in self.model.blocks))
    @rule(pick=picks, lease_s=leases)
    def hit(self, pick: int, lease_s: float) -> None:
        """A match of what is there."""
        live = [b for b in self.model.blocks if b.is_live and b.epoch >= self.model.oldest]
        if live:
            block = live[pick % len(live)]
            self.match([block.key], block.epoch, block.quality, 0, lease_s)

    @rule(keys=st.integers(1, 4))
    def press(self, keys: int) -> None:
        """Somebody needs room on the host, and gives it back."""
        txn_id = self.begin([200 + n for n in range(keys)], 3, LOSSLESS, 9.0)
        del self.model.writing[txn_id]
        self.shard.core.abort(txn_id)

    # -- moves -------------------------------------------------------------------------------------

    @rule(blocks=st.integers(1, 4))
    def start_moves(self, blocks: int) -> None:
        core = self.shard.core
        with patch("kvstore.core.moves.LEASE_S", MOVE_LEASE_S):
            started = core.moves.start(self.shard.now, blocks * NBYTES)
        self.room_was_made = True
        for move in started:
            block = self._block(move)
            assert block.is_live
            assert block.quality is LOSSLESS or not move.is_encoded
            lease = Lease(self.model.time + MOVE_LEASE_S, MOVE_LEASE_S, [block])
            self.model.moving[move] = Moving(block, lease, move.is_encoded)
        self.moves += started

    @precondition(lambda self: self.moves)
    @rule(pick=picks)
    def write_move(self, pick: int) -> None:
        self._write_move(self.moves[pick % len(self.moves)])

    @precondition(lambda self: self.moves)
    @rule(pick=picks)
    def finish_move(self, pick: int) -> None:
        move = self.moves[pick % len(self.moves)]
        if not self._write_move(move):
            self._fail(move)
            return
        moving, before = self.model.moving[move], self.shard.core.revision
        stands = self._is_wanted(moving) and not (moving.encoded and self._has_rival(moving.block))
        assert self.shard.core.moves.done(move) == stands
        self._end(move)
        if stands and moving.encoded:
            row = self.shard.core.index.row(move.target.ref.slot)
            assert row.created > before
            block = Block(moving.block.key, moving.block.epoch, INT8, row.ref, row.created)
            block.nbytes = ENCODED_NBYTES
            self.model.blocks.append(block)
        if stands and move in self.written:
            frame = self.written[move]
            frame.surely = True
            self.placed[move.target.ref.slot, move.target.ref.generation] = frame
        elif not stands:
            self._forget(move)
        self.room_was_made = True  # what was copied may leave the tier it came from

    @precondition(lambda self: self.moves)
    @rule(pick=picks)
    def fail_move(self, pick: int) -> None:
        self._fail(self.moves[pick % len(self.moves)])

    @precondition(lambda self: any(b.is_live for b in self.model.blocks))
    @rule(pick=picks)
    def announce(self, pick: int) -> None:
        live = [b for b in self.model.blocks if b.is_live]
        coming = self.shard.core.moves.want_on_host([live[pick % len(live)].ref.slot])
        assert coming <= 1

    def _write_move(self, move: Move) -> bool:
        """Is it still worth it, and are its bytes where they are to lie?"""
        moving = self.model.moving[move]
        target = move.target.ref
        place = move.to, target.slot, target.generation
        wanted = self._is_wanted(moving)
        assert self.shard.core.moves.is_wanted(move) == wanted
        if place in self.stored:
            return True
        if not wanted:
            return False
        source = moving.block.ref
        came_from = Tier.NVME if move.to is Tier.HOST else Tier.HOST
        block, quality = moving.block, INT8 if moving.encoded else moving.block.quality
        assert self.stored[came_from, source.slot, source.generation] == payload(
            block.key, block.epoch, block.quality
        )
        self.stored[place] = payload(block.key, block.epoch, quality)
        if move.to is Tier.NVME:
            frame = Frame(self._next(), block.key, block.epoch, quality, move.target.nbytes)
            self.disk.append(frame)
            self.written[move] = frame
        return True

    def _fail(self, move: Move) -> None:
        self.shard.core.moves.failed(move)
        self._forget(move)
        self._end(move)

    def _forget(self, move: Move) -> None:
        target = move.target.ref
        self.stored.pop((move.to, target.slot, target.generation), None)

    def _end(self, move: Move) -> None:
        self.moves.remove(move)
        del self.model.moving[move]

    def _is_wanted(self, moving: Moving) -> bool:
        return bool(moving.lease.blocks) and moving.block.is_live

    def _has_rival(self, block: Block) -> bool:
        of = (b for b in self.model.blocks if (b.key, b.epoch, b.quality) == (block.key, block.epoch, INT8))
        return any(b.is_live for b in of)

    def _block(self, move: Move) -> Block:
        return next(b for b in self.model.blocks if b.ref == move.source.ref)

    def _next(self) -> int:
        self.order += 1
        return self.order

    # -- what outlives the shard -------------------------------------------------------------------

    def _forbid(self, keys: set[int], of: int | None) -> None:
        super()._forbid(keys, of)
        self.purges.append((self._next(), keys, of))
        for moving in self.model.moving.values():
            if moving.block.key in keys and of in (None, moving.block.epoch):
                moving.forbidden = True

    @rule(of=epochs, policy=policies, swept=st.booleans())
    def advance(self, of: int, policy: EpochPolicy, swept: bool) -> None:
        self.advances.append((of, policy))
        self._advance(of, policy, swept)

    @rule(seed=st.integers(0, 999))
    def crash(self, seed: int) -> None:
        """What was written may be lost, what was given up may still be there; the rest is as promised."""
        rng, model = random.Random(seed), self.model
        refs = [block.ref for block in model.blocks]
        leases, txns = [LeaseId(lease) for lease in model.leases], list(self.txns)
        policy = model.current, model.lag_max, model.oldest
        self.disk = [f for f in self.disk if f.surely or rng.random() < 0.5]
        self.disk = [f for f in self.disk if not self._is_purged(f)]
        self.placed.clear()
        self.start()
        for number, allowed in self.advances:
            self.shard.core.advance_epoch(MODEL, number, allowed)
        self.model.current, self.model.lag_max, self.model.oldest = policy
        self.nothing_names_what_was(refs, leases, txns)
        self.disk = [frame for frame in self.disk if self._restore(frame)]

    def _restore(self, frame: Frame) -> bool:
        index = frame.key % 100
        parent = key_of(frame.key - 1) if index else ROOT_KEY
        identity = NAMESPACE, key_of(frame.key), parent, index, key_of(frame.key - index), epoch(frame.epoch)
        room = not self.shard.core.index.nvme.lacks(frame.nbytes)
        there = [b for b in self.model.blocks if b.quality is frame.quality]
        twin = any((b.key, b.epoch) == (frame.key, frame.epoch) for b in there)
        ref = self.shard.core.restore(BlockMeta(*identity, frame.quality, LAYOUT.fingerprint), frame.nbytes)
        assert (ref is not None) == (room and not twin and frame.epoch >= self.model.oldest)
        if ref is None:
            return False
        row = self.shard.core.index.at(ref.slot, ref.generation)
        assert row is not None, "restored, and gone"
        block = Block(frame.key, frame.epoch, frame.quality, ref, row.created)
        block.nbytes = frame.nbytes
        self.model.blocks.append(block)
        self.stored[Tier.NVME, ref.slot, ref.generation] = payload(frame.key, frame.epoch, frame.quality)
        self.placed[ref.slot, ref.generation] = frame
        frame.surely = True
        return True

    def _is_purged(self, frame: Frame) -> bool:
        return any(
            order > frame.order and (keys is None or frame.key in keys) and of in (None, frame.epoch)
            for order, keys, of in self.purges
        )

    # -- what holds --------------------------------------------------------------------------------

    @invariant()
    def what_is_pinned_is_read_byte_for_byte(self) -> None:
        """From the tier a reader would be sent to, whatever moved."""
        table = self.shard.core.index.versions
        for block in {b for lease in self.model.leases.values() for b in lease.blocks}:
            ref = block.ref
            place = Tier(table.tiers[ref.slot]), ref.slot, ref.generation
            assert self.stored[place] == payload(block.key, block.epoch, block.quality)

    @invariant()
    def what_lies_below_is_on_the_disk(self) -> None:
        table = self.shard.core.index.versions
        for block in self.model.blocks:
            if block.is_live and table.residences[block.ref.slot] & ON_NVME:
                frame = self.placed[block.ref.slot, block.ref.generation]
                assert frame.surely
                assert not self._is_purged(frame)
                assert (frame.key, frame.epoch, frame.quality) == (block.key, block.epoch, block.quality)


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(
    max_examples=150, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
