"""The seam between a model and how its attention is computed.

A step's rows fall into segments, one a sequence: consecutive new tokens that attend to all of the
sequence's tokens so far and, causally, to each other. What depends on the step but not on the layer
(masks, where the context lies in the pool) is planned once and used by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.pool import KVPool

__all__ = ["AttentionBackend", "AttentionPlan", "Segment"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `row .. row + rows` of the step are positions `start .. start + rows` of one sequence, whose
    KV lies in `slots`, in the order of its blocks."""

    row: int
    rows: int
    start: int
    slots: tuple[int, ...]

    @property
    def context(self) -> int:
        """Tokens whose KV the last row attends to, itself included."""
        return self.start + self.rows


class AttentionPlan(Protocol):
    """Attention for one step. The pool must not change hands while it lives."""

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` [rows, heads, head_dim] for every row of a segment; other rows stay as they are.

        `queries` [rows, heads, head_dim] are rotated. The segment's own K and V of this layer must be in
        the pool already.
        """
        ...


class AttentionBackend(Protocol):
    def plan(self, segments: Sequence[Segment], pool: KVPool) -> AttentionPlan: ...
