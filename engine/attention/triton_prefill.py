"""Paged prefill attention for Triton: chunks of any lengths over cached prefixes, causal, in one launch.

A block of work is up to M // group consecutive positions of one sequence. Its context falls into parts, and
only what some row does not see is masked:

    window 400, sinks 4, tiles of 64, positions 600 .. 663 see
    0 .. 63      sinks                            masked
    192 .. 319   some rows, the window's edge     masked
    320 .. 575   all rows
    576 .. 663   some rows, the causal edge       masked

FlashAttention-2 (arXiv:2307.08691), with a group's query heads in one tile. Costs one read of the visible
context per block (from L2 for all but the first), and no memory but the result.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

import triton
import triton.language as tl

from engine.attention.triton_tiles import attend_tile, load_queries, store_rows

__all__ = ["prefill"]


@triton.jit(do_not_specialize=["window", "sinks"])
def prefill(
    queries, keys, values, key_scales, value_scales, blocks, tables, out,
    row_stride, scale, window, sinks,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, FP8: tl.constexpr,
    WINDOWED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, blocks). `blocks` as in triton_decode.py; where splits begin is not used."""
    kv_head = tl.program_id(0)
    block = blocks + tl.program_id(1) * 8
    row, rows, start = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    table = tables + tl.load(block + 3)
    end = start + rows
    positions = start + tl.arange(0, M) // GROUP
    q = load_queries(queries, row, rows, kv_head, row_stride, GROUP, HEAD_DIM, M, D)
    acc = tl.zeros([M, D], tl.float32)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    seen_by_all = start * 0
    if WINDOWED:
        low = tl.maximum(start - window + 1, 0) // N * N
        seen_by_all = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), N), tl.cdiv(end, N)) * N
        if SINKS:
            for first in range(0, tl.minimum(sinks, low), N):
                acc, highest, total = attend_tile(
                    acc, highest, total, q, first, 0, end, positions, kv_head,
                    keys, values, key_scales, value_scales, table, scale, window, sinks,
                    HEAD_DIM, D, N, BLOCK_TOKENS, KV_HEADS, SCALED, FP8, WINDOWED, MASKED=True,
                )  # fmt: skip
        for first in range(low, seen_by_all, N):
            acc, highest, total = attend_tile(
                acc, highest, total, q, first, 0, end, positions, kv_head,
                keys, values, key_scales, value_scales, table, scale, window, sinks,
                HEAD_DIM, D, N, BLOCK_TOKENS, KV_HEADS, SCALED, FP8, WINDOWED, MASKED=True,
            )  # fmt: skip
    causal_edge = tl.maximum((start + 1) // N * N, seen_by_all)
    for first in range(seen_by_all, causal_edge, N):
        acc, highest, total = attend_tile(
            acc, highest, total, q, first, 0, end, positions, kv_head,
            keys, values, key_scales, value_scales, table, scale, window, sinks,
            HEAD_DIM, D, N, BLOCK_TOKENS, KV_HEADS, SCALED, FP8, WINDOWED, MASKED=False,
        )  # fmt: skip
    for first in range(causal_edge, end, N):
        acc, highest, total = attend_tile(
            acc, highest, total, q, first, 0, end, positions, kv_head,
            keys, values, key_scales, value_scales, table, scale, window, sinks,
            HEAD_DIM, D, N, BLOCK_TOKENS, KV_HEADS, SCALED, FP8, WINDOWED, MASKED=True,
        )  # fmt: skip
    store_rows(out, acc, total, row, rows, kv_head, row_stride, GROUP, HEAD_DIM, M, D)
