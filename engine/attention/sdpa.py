"""Attention by torch's own scaled_dot_product_attention: faster, and its bits depend on the batch.

What EngineConfig.batch_invariant = false uses, and what the invariant way is measured against. A segment
whose slots are adjacent is read in place; others are gathered, once a layer. Of a windowed layer only what
the segment sees is read.

A decode step is hundreds of small calls, one a sequence and layer, each some 20 us of work for one query:
what stands around a call costs as much. So a layer's tensors are turned once, sequences are narrow views of
them, and all their answers are joined by one copy: 16 sequences of 160 tokens take 0.75 of the time
(docs/devlog.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from engine.attention.base import Segment, Windows, hidden_tokens, visible_ranges
from engine.attention.sdpa_split import SPLIT_TOKENS_MIN, SplitRun
from engine.pool import KVPool

__all__ = ["SdpaAttention"]


@dataclass(frozen=True, slots=True)
class _SegmentPlan:
    segment: Segment
    index: torch.Tensor | slice  # flat positions in the pool
    visible: torch.Tensor | None  # bool [rows, tokens read]; None where one row sees all, or is_causal says
    is_causal: bool = False  # the segment is all there is, and each row sees those up to itself


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
        runs = {id(segments): [_Run(run, pool) for run in _runs(segments)] for segments in plans}
        self._runs = [runs[id(segments)] for segments in plans]  # by layer
        self._pool = pool

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        keys, values = _Side(self._pool.keys(layer)), _Side(self._pool.values(layer))
        for run in self._runs[layer]:
            run.attend(keys, values, queries[run.rows], out[run.rows])


class _Run:
    """Rows that are attended together: one segment, or several of one row each."""

    def __init__(self, plans: Sequence[_SegmentPlan], pool: KVPool) -> None:
        last = plans[-1].segment
        self.rows = slice(plans[0].segment.row, last.row + last.rows)
        self._plans = plans
        self._kv_heads = pool.layout.kv_heads
        where = [plan.index for plan in plans if isinstance(plan.index, slice)]
        is_long = last.rows == 1 and any(at.stop - at.start >= SPLIT_TOKENS_MIN for at in where)
        can_split = len(where) == len(plans) and pool.device.type == "cpu"
        self._split = SplitRun(where) if is_long and can_split else None

    def attend(self, keys: _Side, values: _Side, queries: torch.Tensor, out: torch.Tensor) -> None:
        if self._split is not None:
            out.copy_(self._split.attend(keys.flat, values.flat, queries))
            return
        is_one = len(self._plans) == 1
        asked = [_turned(queries)] if is_one else torch.split(queries.unsqueeze(2), 1)
        answers = [
            F.scaled_dot_product_attention(
                query,
                keys.taken(plan.index),
                values.taken(plan.index),
                attn_mask=plan.visible,
                is_causal=plan.is_causal,
                enable_gqa=queries.shape[1] != self._kv_heads,
            )
            for query, plan in zip(asked, self._plans, strict=True)
        ]
        if is_one:
            out.copy_(answers[0].squeeze(0).transpose(0, 1))
        else:
            torch.cat(answers, out=out.unsqueeze(2))


def _runs(plans: Sequence[_SegmentPlan]) -> Iterator[list[_SegmentPlan]]:
    """Segments of one row each, in rows one after another, together; any other alone."""
    rows = {id(plan): index for index, plan in enumerate(plans)}

    def place(plan: _SegmentPlan) -> tuple[bool, int]:
        one = plan.segment.rows == 1
        return one, plan.segment.row - rows[id(plan)] if one else plan.segment.row

    for _, run in groupby(plans, place):
        yield list(run)


def _turned(rows: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] as [1, heads, tokens, head_dim], in place."""
    return rows.transpose(0, 1).unsqueeze(0)


class _Side:
    """A layer's keys, or its values: [tokens, kv_heads, head_dim]."""

    __slots__ = ("_turned", "flat")

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat
        self._turned = _turned(flat)

    def taken(self, index: torch.Tensor | slice) -> torch.Tensor:
        """[1, kv_heads, len(index), head_dim]"""
        if isinstance(index, slice):
            return self._turned.narrow(2, index.start, index.stop - index.start)
        return _turned(self.flat.index_select(0, index))


def _plan(segment: Segment, pool: KVPool, window: int | None, sinks: int) -> _SegmentPlan:
    ranges = visible_ranges(segment, window, sinks)
    where = [pool.token_index(segment.slots, tokens.start, tokens.stop) for tokens in ranges]
    index = where[0] if len(where) == 1 else torch.cat([_as_tensor(rows) for rows in where])
    if isinstance(index, torch.Tensor):
        index = index.to(pool.device)
    if segment.rows == 1:
        return _SegmentPlan(segment, index, None)
    if segment.start == 0 and (window is None or window >= segment.rows):
        return _SegmentPlan(segment, index, None, is_causal=True)
    positions = torch.arange(segment.start, segment.context).unsqueeze(1)
    tokens = torch.cat([torch.arange(seen.start, seen.stop) for seen in ranges])
    visible = ~hidden_tokens(positions, tokens, window, sinks)
    return _SegmentPlan(segment, index, visible.to(pool.device))


def _as_tensor(rows: torch.Tensor | slice) -> torch.Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
