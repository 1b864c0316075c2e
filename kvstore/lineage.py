"""Lineage: what a sequence's KV was computed from decides what its new blocks may be published as.

A block may be published at (epoch, quality) only if everything it attended to was of that epoch and at
least that quality. Keys cannot express this, so every sequence carries a `Lineage`: it absorbs each block
the sequence onboards, and the floor never rises again.

    own epoch 7, onboard [e7 lossless][e7 int8][e7 lossless]  ->  publishes at (7, int8)
    own epoch 7, onboard [e7 lossless][e6 lossless]           ->  publishes nothing: request-local
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.nouns import Epoch, Quality


@dataclass(frozen=True, slots=True)
class Lineage:
    epoch: Epoch  # of the weights that compute this sequence
    floor: Quality = Quality.LOSSLESS
    foreign: bool = False  # something it attended to was of another epoch

    def absorb(self, epoch: Epoch, quality: Quality) -> Lineage:
        """The lineage after onboarding a block of (epoch, quality)."""
        foreign = self.foreign or epoch != self.epoch
        return Lineage(self.epoch, min(self.floor, quality), foreign)

    @property
    def publishable(self) -> Quality | None:
        """The quality at which this sequence may publish, or None: keep it request-local."""
        return None if self.foreign else self.floor


def publishable(quality: Quality, over: Lineage | None) -> Quality | None:
    """What KV of `quality` may claim that was computed over `over`. None: it stays request-local."""
    if over is None:
        return quality
    return None if over.publishable is None else min(quality, over.publishable)
