"""Attention as its formula says, in float64: what every backend is compared with. Slow, and meant to be read.

softmax over the tokens a query sees of (q k / sqrt(head_dim)), times v; which tokens those are, base.py says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention.base import Segment, Windows, hidden_tokens
from engine.pool import KVPool

__all__ = ["ReferenceAttention"]


class ReferenceAttention:
    """A loop over segments, rows and heads. float64 whatever the pool's dtype, rounded once into `out`."""

    def __init__(self, heads: int, windows: Windows, sinks: int = 0) -> None:
        self._heads = heads
        self._windows = windows
        self._sinks = sinks

    def plan(self, segments: Sequence[Segment], pool: KVPool) -> ReferencePlan:
        return ReferencePlan(segments, pool, self._heads, self._windows, self._sinks)


class ReferencePlan:
    def __init__(
        self, segments: Sequence[Segment], pool: KVPool, heads: int, windows: Windows, sinks: int
    ) -> None:
        self._segments = segments
        self._pool = pool
        self._group = heads // pool.layout.kv_heads
        self._windows = windows
        self._sinks = sinks

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        size, window = self._pool.layout.block_tokens, self._windows[layer]
        for segment in self._segments:
            tokens = torch.arange(segment.context)
            where = torch.tensor(segment.slots)[tokens // size] * size + tokens % size
            keys = self._pool.keys(layer)[where].double()
            values = self._pool.values(layer)[where].double()
            for i in range(segment.rows):
                position = torch.tensor(segment.start + i)
                hidden = hidden_tokens(position, tokens, window, self._sinks)
                for head in range(queries.shape[1]):
                    of_head = head // self._group
                    query = queries[segment.row + i, head].double()
                    scores = keys[:, of_head] @ query / queries.shape[2] ** 0.5
                    weights = scores.masked_fill(hidden, -torch.inf).softmax(0)
                    out[segment.row + i, head] = (weights @ values[:, of_head]).to(out.dtype)
