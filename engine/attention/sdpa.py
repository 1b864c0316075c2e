"""Attention by torch's own scaled_dot_product_attention: faster, and its bits depend on the batch.

What EngineConfig.batch_invariant = false uses, and what the invariant way is measured against. A segment
whose slots are adjacent is read in place; others are gathered, once a layer. Of a windowed layer only what
the segment sees is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention.base import Segment, Windows, hidden_tokens, visible_ranges
from engine.pool import KVPool

__all__ = ["SdpaAttention"]


@dataclass(frozen=True, slots=True)
class _SegmentPlan:
    segment: Segment
    index: torch.Tensor | slice  # flat positions in the pool
    visible: torch.Tensor | None  # bool [rows, tokens read]; None when one row sees them all


class SdpaAttention:
    """Stateless: everything is in the plan."""

    def __init__(self, windows: Windows, sinks: int = 0) -> None:
        self._windows = windows
        self._sinks = sinks

    def plan(self, segments: Sequence[Segment], pool: KVPool) -> SdpaPlan:
        plans = {
            window: [_plan(segment, pool, window, self._sinks) for segment in segments]
            for window in set(self._windows)
        }
        return SdpaPlan([plans[window] for window in self._windows], pool)


class SdpaPlan:
    def __init__(self, plans: list[list[_SegmentPlan]], pool: KVPool) -> None:
        self._plans = plans  # by layer
        self._pool = pool

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        keys, values = self._pool.keys(layer), self._pool.values(layer)
        for plan in self._plans[layer]:
            rows = slice(plan.segment.row, plan.segment.row + plan.segment.rows)
            result = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1).unsqueeze(0),
                keys[plan.index].transpose(0, 1).unsqueeze(0),
                values[plan.index].transpose(0, 1).unsqueeze(0),
                attn_mask=plan.visible,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
            out[rows] = result.squeeze(0).transpose(0, 1)


def _plan(segment: Segment, pool: KVPool, window: int | None, sinks: int) -> _SegmentPlan:
    ranges = visible_ranges(segment, window, sinks)
    where = [pool.token_index(segment.slots, tokens.start, tokens.stop) for tokens in ranges]
    index = where[0] if len(where) == 1 else torch.cat([_as_tensor(rows) for rows in where])
    if isinstance(index, torch.Tensor):
        index = index.to(pool.device)
    if segment.rows == 1:
        return _SegmentPlan(segment, index, None)
    positions = torch.arange(segment.start, segment.context).unsqueeze(1)
    tokens = torch.cat([torch.arange(seen.start, seen.stop) for seen in ranges])
    visible = ~hidden_tokens(positions, tokens, window, sinks)
    return _SegmentPlan(segment, index, visible.to(pool.device))


def _as_tensor(rows: torch.Tensor | slice) -> torch.Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
