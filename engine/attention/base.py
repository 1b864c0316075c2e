"""The seam between a model and how its attention is computed.

A step's rows fall into segments, one a sequence: consecutive new tokens that attend to all of the
sequence's tokens so far and, causally, to each other. What depends on the step but not on the layer
(masks, where the context lies in the pool) is planned once and used by every layer of the same window.

A backend is made with `windows`, one entry a layer: how many tokens a query sees, itself included; None is
all of them. The first `sinks` tokens of a sequence stay visible behind a window (0 where the model has none;
StreamingLLM, arXiv:2309.17453). Nothing else hides a token:

    window 4, sinks 0, query at 9     . . . . . . 6 7 8 9
    window 4, sinks 2, query at 9     0 1 . . . . 6 7 8 9
    window 4, sinks 2, query at 4     0 1 2 3 4
    window None,       query at 4     0 1 2 3 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.pool import KVPool

__all__ = ["AttentionBackend", "AttentionPlan", "Segment", "Windows", "hidden_tokens", "visible_ranges"]

Windows = tuple[int | None, ...]
"""Of each layer: the tokens that a query sees, itself included (1 or more). None: all."""


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
    """Made with `windows: Windows` and `sinks: int = 0`, see the module."""

    def plan(self, segments: Sequence[Segment], pool: KVPool) -> AttentionPlan:
        """Plan one step. `pool` has as many layers as there are windows."""
        ...


def visible_ranges(segment: Segment, window: int | None, sinks: int) -> tuple[range, ...]:
    """The tokens that any row of the segment sees, in order: one range, or the sinks and, apart from them,
    the window. No other token need be read."""
    begin = 0 if window is None else max(0, segment.start - window + 1)
    if begin <= sinks:
        return (range(segment.context),)
    seen = range(begin, segment.context)
    return (range(sinks), seen) if sinks else (seen,)


def hidden_tokens(
    positions: torch.Tensor, tokens: torch.Tensor, window: int | None, sinks: int
) -> torch.Tensor:
    """The rule of the module: bool, which of `tokens` a query at each of `positions` does not see.

    Both int64 and absolute in one sequence, of shapes that broadcast ([queries, 1] and [tokens]).
    """
    hidden = tokens > positions
    if window is not None:
        hidden |= (tokens <= positions - window) & (tokens >= sinks)
    return hidden
