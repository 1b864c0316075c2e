"""Paged decode attention for Triton: the context in splits, so that a few rows keep a whole GPU busy.

    context      0 . . . . . . . . . . . . . . . . . 1 000        one row, one KV head
    programs     [ split 0 ][ split 1 ][ split 2 ][ 3 ]           each: maximum, sum, products so far
    reduce       added up in the order of positions               one program a row and KV head

Flash-Decoding (Dao et al. 2023). A block of work is up to M // group consecutive positions of one sequence:
one when it decodes, a few when drafts are verified. Behind a window there are splits of the window alone,
and one of its own, the first, for sinks.

FIXED: splits of `split_tokens` at absolute positions. With the tile's fixed shape and the order of additions
a row's bits then depend on nothing but its own sequence: not on the batch, and not on whether it came alone
or as one of a chunk (the price: chunks read their context once for every M // group positions). Otherwise
each block's context is cut into `n_splits` equal parts, a number that the host picks to fill the device and
that a captured graph can keep while contexts grow.

Costs one read of the context per block, and float32 partials of M x D a split.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

import triton
import triton.language as tl

from engine.attention.triton_tiles import attend_tile, load_queries, store_rows

__all__ = ["decode_reduce", "decode_split"]


@triton.jit
def _split_bounds(
    split, n_splits, split_tokens, start, rows, window, sinks,
    N: tl.constexpr, FIXED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Tokens begin .. stop of a split; none if begin >= stop. `n_splits` counts the sinks' own."""
    end = start + rows
    low = start * 0
    if WINDOWED:
        low = tl.maximum(start - window + 1, 0)
    if SINKS:
        low = tl.maximum(low, sinks)
    index = split
    parts = n_splits
    if SINKS:
        index = split - 1
        parts = n_splits - 1
    if FIXED:
        size = split_tokens
        base = low // split_tokens * split_tokens
    else:
        base = low // N * N
        size = tl.cdiv(tl.cdiv(tl.maximum(end - base, 1), parts), N) * N
    begin = tl.maximum(base + index * size, low)
    stop = tl.minimum(base + (index + 1) * size, end)
    if SINKS:
        begin = tl.where(split == 0, 0, begin)
        stop = tl.where(split == 0, tl.minimum(sinks, end), stop)
    return begin, stop


@triton.jit(do_not_specialize=["window", "sinks", "n_splits"])
def decode_split(
    queries, keys, values, key_scales, value_scales, blocks, tables, sums, extremes,
    row_stride, scale, window, sinks, n_splits, split_tokens,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, FP8: tl.constexpr,
    FIXED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, n_splits, blocks): heads first, since neighbours in memory should be read together.

    `blocks` int32 [blocks, 8], five used: first row, rows (0: nothing to do), position of the first row,
    where its slots begin in `tables`, where its splits begin in `sums` float32 [splits, kv_heads, M, D] and
    `extremes` float32 [splits, kv_heads, 2, M] (maxima, then totals).
    """
    kv_head, split = tl.program_id(0), tl.program_id(1)
    block = blocks + tl.program_id(2) * 8
    row, rows, start = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    begin, stop = _split_bounds(
        split, n_splits, split_tokens, start, rows, window, sinks, N, FIXED, WINDOWED, SINKS
    )
    if rows == 0:
        return
    if begin >= stop:
        return
    table = tables + tl.load(block + 3)
    r = tl.arange(0, M)
    positions = start + r // GROUP
    q = load_queries(queries, row, rows, kv_head, row_stride, GROUP, HEAD_DIM, M, D)
    acc = tl.zeros([M, D], tl.float32)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for first in range(begin // N * N, stop, N):
        acc, highest, total = attend_tile(
            acc, highest, total, q, first, begin, stop, positions, kv_head,
            keys, values, key_scales, value_scales, table, scale, window, sinks,
            HEAD_DIM, D, N, BLOCK_TOKENS, KV_HEADS, SCALED, FP8, WINDOWED, MASKED=True,
        )  # fmt: skip
    place = (tl.load(block + 4) + split).to(tl.int64) * KV_HEADS + kv_head
    some = r < rows * GROUP
    at = place * (M * D) + r[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(sums + at, acc, mask=some[:, None])
    tl.store(extremes + place * (2 * M) + r, highest, mask=some)
    tl.store(extremes + place * (2 * M) + M + r, total, mask=some)


@triton.jit(do_not_specialize=["window", "sinks", "n_splits"])
def decode_reduce(
    out, blocks, sums, extremes, row_stride, window, sinks, n_splits, split_tokens,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    FIXED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, blocks). A split without tokens was never written, and is not read."""
    kv_head = tl.program_id(0)
    block = blocks + tl.program_id(1) * 8
    row, rows, start = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    if rows == 0:
        return
    begins_at = tl.load(block + 4)
    r = tl.arange(0, M)
    acc = tl.zeros([M, D], tl.float32)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for split in range(0, n_splits):
        begin, stop = _split_bounds(
            split, n_splits, split_tokens, start, rows, window, sinks, N, FIXED, WINDOWED, SINKS
        )
        some = r < tl.where(begin < stop, rows * GROUP, 0)
        place = (begins_at + split).to(tl.int64) * KV_HEADS + kv_head
        at = place * (M * D) + r[:, None] * D + tl.arange(0, D)[None, :]
        one_acc = tl.load(sums + at, mask=some[:, None], other=0.0)
        one_highest = tl.load(extremes + place * (2 * M) + r, mask=some, other=float("-inf"))
        one_total = tl.load(extremes + place * (2 * M) + M + r, mask=some, other=0.0)
        now_highest = tl.maximum(highest, one_highest)
        base = tl.where(now_highest == float("-inf"), 0.0, now_highest)
        keep, take = tl.exp2(highest - base), tl.exp2(one_highest - base)
        total = total * keep + one_total * take
        acc = acc * keep[:, None] + one_acc * take[:, None]
        highest = now_highest
    store_rows(out, acc, total, row, rows, kv_head, row_stride, GROUP, HEAD_DIM, M, D)
