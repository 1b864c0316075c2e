"""Triton's decode attention with everything at fixed addresses: what a CUDA graph can record.

The step is laid out once, as if every row's context filled its table (triton_plan.py): how many splits there
are follows from that, and a kernel whose split is empty ends at once. What changes from step to step, the
position of each row and where its blocks lie, is copied into the layout on the device.
"""

from __future__ import annotations

import torch

from engine.attention.base import Segment
from engine.attention.triton_attention import TritonAttention, TritonPlan
from engine.attention.triton_plan import BLOCK_FIELDS, lay_out
from engine.pool import KVPool

__all__ = ["StaticTritonAttention", "StaticTritonPlan"]

_START: int = 2
"""The field of a block of work that is its row's position (triton_decode.py)."""


class StaticTritonAttention(TritonAttention):
    """Steps of any shape as its parent does them."""

    def decode_plan(self, tables: torch.Tensor, positions: torch.Tensor, pool: KVPool) -> StaticTritonPlan:
        """For rows of one token each: see PagedDecode."""
        return StaticTritonPlan(self, tables, positions, pool)


class StaticTritonPlan(TritonPlan):
    def __init__(
        self, backend: TritonAttention, tables: torch.Tensor, positions: torch.Tensor, pool: KVPool
    ) -> None:
        rows, blocks = tables.shape
        last = blocks * pool.layout.block_tokens - 1
        full = [Segment(row, 1, last, (0,) * blocks) for row in range(rows)]
        laid = lay_out(full, backend.shape(pool), pool.layout, backend.windows)
        ints = torch.from_numpy(laid.ints).to(pool.device)
        super().__init__(backend, laid, ints, pool)
        # Of equal contexts, rows stay in their order: block i is row i.
        self._starts = ints[: rows * BLOCK_FIELDS].view(rows, BLOCK_FIELDS)[:, _START]
        self._tables = ints[rows * BLOCK_FIELDS :].view(rows, blocks)
        self._from = positions, tables

    def refresh(self) -> None:
        """Take over positions and tables as they are on the device."""
        positions, tables = self._from
        self._starts.copy_(positions)
        self._tables.copy_(tables)
