"""Attention by torch's own scaled_dot_product_attention: faster, and its bits depend on the batch.

What EngineConfig.batch_invariant = false uses, and what the invariant way is measured against. A segment
whose slots are adjacent is read in place; others are gathered, once a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention.base import Segment
from engine.pool import KVPool

__all__ = ["SdpaAttention"]


@dataclass(frozen=True, slots=True)
class _SegmentPlan:
    segment: Segment
    index: torch.Tensor | slice  # flat positions in the pool
    visible: torch.Tensor | None  # bool [rows, context]; None when one row sees everything


class SdpaAttention:
    """Stateless: everything is in the plan."""

    def plan(self, segments: Sequence[Segment], pool: KVPool) -> SdpaPlan:
        return SdpaPlan([self._plan(segment, pool) for segment in segments], pool)

    @staticmethod
    def _plan(segment: Segment, pool: KVPool) -> _SegmentPlan:
        index = pool.token_index(segment.slots, 0, segment.context)
        if segment.rows == 1:
            return _SegmentPlan(segment, index, None)
        positions = torch.arange(segment.start, segment.context).unsqueeze(1)
        return _SegmentPlan(segment, index, torch.arange(segment.context) <= positions)


class SdpaPlan:
    def __init__(self, plans: list[_SegmentPlan], pool: KVPool) -> None:
        self._plans = plans
        self._pool = pool

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        keys, values = self._pool.keys(layer), self._pool.values(layer)
        for plan in self._plans:
            rows = slice(plan.segment.row, plan.segment.row + plan.segment.rows)
            result = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1).unsqueeze(0),
                keys[plan.index].transpose(0, 1).unsqueeze(0),
                values[plan.index].transpose(0, 1).unsqueeze(0),
                attn_mask=plan.visible,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
            out[rows] = result.squeeze(0).transpose(0, 1)
