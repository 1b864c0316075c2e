"""Attention by Triton kernels: what CUDA devices use (an extra: `pip install triton`).

    segments of few rows   -> triton_decode.py    split over the context
    longer ones            -> triton_prefill.py   causal, over cached prefix and chunk
    batch-invariant mode   -> triton_decode.py for all: a row's bits depend on its sequence alone

A step's metadata (triton_plan.py) is one int32 array, made on the host and copied to the device once, from
pinned memory; `attend` launches two or three kernels and waits for nothing. The pool may be quantised
(engine/quantised_pool.py): the kernels then read codes and scales.

In Triton's interpreter (TRITON_INTERPRET=1 when triton is first imported) it runs on the CPU, which is how
it is tested. Speed and bits on CUDA have not been measured yet: benchmarks/gpu.py does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import triton

from engine.attention.base import Segment, Windows
from engine.attention.triton_decode import decode_reduce, decode_split
from engine.attention.triton_plan import BLOCK_FIELDS, Shape, Work, Works, decode_work, lay_out
from engine.attention.triton_prefill import prefill
from engine.attention.triton_tuning import ROWS_MIN, Tuning, query_rows
from engine.pool import KVPool

__all__ = ["TritonAttention", "TritonPlan"]

_LOG2_E: Final = math.log2(math.e)
_PROGRAMS_A_CORE: Final = 8
"""Programs of decode for each multiprocessor: a few rounds of the two or three that one holds, so that the
last round costs little."""
_CORES_OF_NO_GPU: Final = 2  # the interpreter's: enough for splits to be tested


class TritonAttention:
    """`heads` is the model's; KV heads and head_dim are the pool's. See base.py for `windows` and `sinks`.
    `tuning` None: Tuning.of the pool."""

    def __init__(
        self,
        heads: int,
        windows: Windows,
        sinks: int = 0,
        *,
        batch_invariant: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        self.heads = heads
        self.windows = windows
        self.sinks = sinks
        self.batch_invariant = batch_invariant
        self._tuning = tuning

    def tuning(self, pool: KVPool) -> Tuning:
        if self._tuning is not None:
            return self._tuning
        return Tuning.of(pool.layout.head_dim, pool.dtype, quantised=pool.hot != "model")

    def shape(self, pool: KVPool) -> Shape:
        tuning, group = self.tuning(pool), self.heads // pool.layout.kv_heads
        return Shape(
            decode_rows=query_rows(group, ROWS_MIN) // group,
            prefill_rows=query_rows(group, tuning.prefill_rows) // group,
            split_tokens=tuning.split_tokens,
            split_tokens_min=4 * tuning.decode_tile,
            programs_wanted=_PROGRAMS_A_CORE * _cores(pool.device),
            kv_heads=pool.layout.kv_heads,
            sinks=self.sinks,
            batch_invariant=self.batch_invariant,
        )

    def plan(self, segments: Sequence[Segment], pool: KVPool) -> TritonPlan:
        """Some 10 us a segment and 40 ns a slot; one copy to the device, none back."""
        made, works = lay_out(segments, self.shape(pool), pool.layout, self.windows)
        ints = torch.from_numpy(made)
        if pool.device.type == "cuda":
            ints = ints.pin_memory().to(pool.device, non_blocking=True)
        return TritonPlan(self, works, ints, ints, pool)

    def decode_plan(self, tables: torch.Tensor, positions: torch.Tensor, pool: KVPool) -> TritonPlan:
        """Row i of the step is the token at `positions[i]` of the sequence whose slots are `tables[i]`
        (int32 [rows, blocks], contiguous). Both are read on the device, at every replay of what is recorded
        with this plan: how many programs there are is that of the longest context the tables have room for,
        and each row's context is cut among them on the device."""
        rows, width = tables.shape
        shape = self.shape(pool)
        work = decode_work(rows, width * pool.layout.block_tokens, shape, self.windows)
        count = torch.arange(rows, dtype=torch.int32, device=tables.device)
        each = work.partials // rows
        columns = (count, torch.ones_like(count), positions, count * width, count * each)
        ints = torch.zeros(rows, BLOCK_FIELDS, dtype=torch.int32, device=tables.device)
        for field, column in enumerate(columns):
            ints[:, field] = column
        return TritonPlan(self, Works((work,), None), ints.flatten(), tables, pool)


class TritonPlan:
    """One step's metadata on the device, and the scratch memory of all layers."""

    def __init__(
        self, backend: TritonAttention, works: Works, blocks: torch.Tensor, tables: torch.Tensor, pool: KVPool
    ) -> None:
        tuning, layout = backend.tuning(pool), pool.layout
        self._backend = backend
        self._works = works
        self._blocks = blocks
        self._tables = tables
        self._pool = pool
        self._scale = _LOG2_E * layout.head_dim**-0.5
        group = backend.heads // layout.kv_heads
        rows = query_rows(group, ROWS_MIN)
        padded: int = max(ROWS_MIN, triton.next_power_of_2(layout.head_dim))
        sizes = {
            "GROUP": group, "HEAD_DIM": layout.head_dim, "D": padded, "KV_HEADS": layout.kv_heads,
            "enable_fp_fusion": True,
        }  # fmt: skip
        stored = {
            "BLOCK_TOKENS": layout.block_tokens,
            "SCALED": pool.hot != "model",
            "FP8": pool.hot == "fp8",
        }
        self._reduce: dict[str, Any] = {
            **sizes, "M": rows, "N": tuning.decode_tile, "FIXED": backend.batch_invariant, "num_warps": 4,
        }  # fmt: skip
        self._decode: dict[str, Any] = {
            **self._reduce, **stored, "num_warps": tuning.decode_warps, "num_stages": tuning.decode_stages,
        }  # fmt: skip
        self._prefill: dict[str, Any] = {
            **sizes, **stored, "M": query_rows(group, tuning.prefill_rows), "N": tuning.prefill_tile,
            "num_warps": tuning.prefill_warps, "num_stages": tuning.prefill_stages,
        }  # fmt: skip
        partials = max((work.partials for work in works.decode), default=0) * layout.kv_heads
        self._split_tokens = tuning.split_tokens
        self._sums = torch.empty(partials * rows * padded, device=pool.device)
        self._extremes = torch.empty(partials * 2 * rows, device=pool.device)

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        """As base.py has it."""
        assert out.is_contiguous(), "rows are found by one stride"
        queries = queries.contiguous()
        window = self._backend.windows[layer]
        held = self._pool.held(layer)
        masks = {"WINDOWED": window is not None, "SINKS": window is not None and self._backend.sinks > 0}
        visible = (window or 0, self._backend.sinks)
        for work in self._works.decode:
            self._attend_split(work, held, queries, out, window, masks)
        chunks = self._works.prefill
        if chunks is not None:
            prefill[(self._pool.layout.kv_heads, chunks.blocks)](
                queries, *held, self._blocks[chunks.first :], self._tables, out,
                queries.stride(0), self._scale, *visible, **self._prefill, **masks,
            )  # fmt: skip

    def _attend_split(
        self,
        work: Work,
        held: tuple[torch.Tensor, ...],
        queries: torch.Tensor,
        out: torch.Tensor,
        window: int | None,
        masks: dict[str, bool],
    ) -> None:
        kv_heads, splits, blocks = self._pool.layout.kv_heads, work.splits[window], self._blocks[work.first :]
        counts = (window or 0, self._backend.sinks, splits, self._split_tokens)
        decode_split[(kv_heads, splits, work.blocks)](
            queries, *held, blocks, self._tables, self._sums, self._extremes,
            queries.stride(0), self._scale, *counts, **self._decode, **masks,
        )  # fmt: skip
        decode_reduce[(kv_heads, work.blocks)](
            out, blocks, self._sums, self._extremes, out.stride(0), *counts, **self._reduce, **masks
        )


def _cores(device: torch.device) -> int:
    if device.type != "cuda":
        return _CORES_OF_NO_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
