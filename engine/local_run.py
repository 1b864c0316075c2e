"""What one sequence has in its worker's edge shard: the blocks lent to it, and those it leaves there.

    lent (waiting) -> handed to the worker loop -> admitted -> filled ... -> ended
       |-> recalled: an admission before it         |<-- again --- preempted --|
           needed the slots; it computes what was lent

Ended exactly once, by who holds it: the role until `WorkerLoop.admit` is called, the loop from then on, after
the engine has let go of the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from engine.types import GenerationRequest
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import BlockMeta, Epoch, LeaseId, NamespaceId, PinnedBlock, Quality

if TYPE_CHECKING:
    from engine.edge import EdgeShard

__all__ = ["LocalRun"]


class LocalRun:
    """`blocks[i]` is chain block i, lying in the pool's slot `slots[i]`. One event loop's."""

    __slots__ = (
        "_chain", "_edge", "_ended", "_in_engine", "_onboarded", "_quality",
        "begun_at", "blocks", "epoch", "handed_over", "leases", "namespace", "owner", "recalled", "slots",
    )  # fmt: skip

    def __init__(self, edge: EdgeShard, namespace: NamespaceId, chain: KeyChain, owner: str) -> None:
        self.namespace = namespace
        self.owner = owner
        self.blocks: tuple[PinnedBlock, ...] = ()
        self.slots: list[int] = []
        self.leases: list[LeaseId] = []
        self.recalled = False  # what was lent is gone: neither it nor what stands behind it is there
        self.handed_over = False  # to the worker loop, which ends it from here on
        self.epoch = edge.epoch  # all that it is lent or leaves is of this one
        self.begun_at = edge.forgotten  # how often something had been forgotten by then
        self._edge = edge
        self._chain = chain
        self._ended = False
        self._in_engine = False
        self._onboarded: Sequence[tuple[Epoch, Quality]] = ()
        self._quality: Quality | None = None

    @property
    def waiting(self) -> bool:
        """Lent to a request that is not in the engine yet, nor on its way there."""
        return not (self.handed_over or self._in_engine or self._ended) and bool(self.slots)

    @property
    def gone(self) -> bool:
        """Recalled, or ended."""
        return self.recalled or self._ended

    def lent(self, blocks: tuple[PinnedBlock, ...], slots: list[int], lease: LeaseId) -> None:
        self.blocks, self.slots = blocks, slots
        self.leases.append(lease)

    def over(self, lineage: Lineage) -> Lineage:
        """The lineage of a sequence that attends to what is lent now. What is read from here on stands behind
        that: if something was recalled before, it is no loss."""
        self.recalled = False
        for block in self.blocks:
            lineage = lineage.absorb(block.epoch, block.quality)
        return lineage

    def will_keep(self, lineage: Lineage, onboarded: Sequence[tuple[Epoch, Quality]]) -> None:
        """What the blocks behind the lent ones are: those onboarded by what they were read as, those computed
        by the sequence's lineage."""
        self._quality, self._onboarded = lineage.publishable, onboarded

    def admitted(self, slots: tuple[int, ...]) -> None:
        """The engine has it, and what is there of its chain lies in `slots`: what was onboarded may stay."""
        if self._ended:
            return
        self._in_engine = True
        if self.recalled:
            return  # nothing was onboarded either: all of it is computed
        first = len(self.slots)
        # A stale block is this sequence's alone: another epoch's name is not ours to give.
        usable = [
            (first + i, quality) for i, (epoch, quality) in enumerate(self._onboarded) if epoch == self.epoch
        ]
        for quality, group in groupby(usable, key=lambda entry: entry[1]):
            indexes = [index for index, _ in group]
            self._edge.keep(self, indexes, [slots[index] for index in indexes], quality)

    def filled(self, index: int, slot: int) -> None:
        """Block `index` was computed in `slot` and is full; its tokens stand in the chain. Where two share it
        (engine/sharing.py), who is told first keeps it."""
        if self._ended or not self._in_engine or self._edge.slots.is_kept(slot):
            return
        if self._quality is not None:
            self._edge.keep(self, [index], [slot], self._quality)

    def join(self, tenant: str, read: int) -> int:
        """Others may have brought here meanwhile what it has read, or part of it: that is lent too, if it is
        no lesser, instead of a second copy; how many of the `read` blocks."""
        if not read:
            return 0
        held = len(self.slots)
        usable = held + read
        run = self._edge.lend(self.namespace, tenant, self._chain, usable, self.owner, least=self._quality)
        more = max(0, len(run.slots) - held)
        self._edge.counters["edge:lent"] -= len(run.slots) - more  # counted before
        if more:
            self._edge.take_back(self)
            self.blocks, self.slots, self.leases = run.blocks, run.slots, run.leases
            self._onboarded = self._onboarded[more:]
            run.slots, run.leases = [], []
        run.end()
        return more

    def again(self, request: GenerationRequest) -> LocalRun:
        """For the sequence's next life, after it was preempted: what lies here now of its chain, none of it
        lesser than what it has been over until now, so that its lineage stays what it is."""
        self.end()
        tokens = len(request.prompt_ids) + len(request.output_ids)
        usable = (tokens - 1) // self._chain.block_tokens
        run = self._edge.lend(
            self.namespace, request.tenant, self._chain, usable, self.owner, least=self._quality
        )
        run._quality = self._quality
        return run

    def recall(self) -> None:
        """An admission before it needs the slots: what was lent is gone, and what was read behind it is of no
        use."""
        self.give_up()
        self.recalled = True

    def give_up(self) -> None:
        """Return what was lent, before it is used and before anything behind it was read."""
        assert not self._in_engine, "what an engine reads is not given up"
        self._edge.take_back(self)
        self.blocks = ()

    def abandon(self) -> None:
        """Its request ended. Nothing, once the worker loop has it."""
        if not self.handed_over:
            self.end()

    def end(self) -> None:
        """The engine reads none of it any more. Idempotent."""
        if not self._ended:
            self._ended = True
            self._edge.end(self)

    def describe(self, index: int, epoch: Epoch, quality: Quality) -> BlockMeta:
        chain = self._chain
        return BlockMeta(
            namespace=self.namespace,
            key=chain.keys[index],
            parent=chain.parent(index),
            chain_index=index,
            placement=chain.placement(index),
            epoch=epoch,
            quality=quality,
            fingerprint=self._edge.fingerprint,
        )
