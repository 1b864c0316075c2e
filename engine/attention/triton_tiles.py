"""What Triton's decode and prefill attention share: a tile of queries meets a tile of the paged context.

    rows of a query tile     position 0: heads of the group | position 1: heads of the group | ... | padding
    columns of a score tile  N tokens at absolute positions  first .. first + N

A KV head's whole group of query heads is one tile, so its keys and values are read once and products are
large enough for tensor cores. Where a token lies is looked up in the sequence's table of slots, so a tile
may cross any number of blocks. Softmax is online (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention-2,
arXiv:2307.08691), scores carry log2(e), sums are float32.

A token that a row does not see adds exact zeros to that row, and a row that has seen nothing yet has
maximum -inf and sums of zero: which other rows share a tile, and which tiles they need, does not matter to
a row. Tokens outside begin .. end are never read: what lies there may be NaN.

A quantised pool's codes go into the products as they are (int8 and e4m3 numbers are exact in bfloat16,
float16 and float32); a key's scale is multiplied onto its scores, a value's onto its weights.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_tile", "load_queries", "store_rows"]


@triton.jit
def _row_places(row, kv_head, row_stride, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr):
    """Where each row of a query tile begins in [rows, heads, head_dim]."""
    r = tl.arange(0, M)
    head = kv_head * GROUP + r % GROUP
    return (row + r // GROUP).to(tl.int64) * row_stride + head * HEAD_DIM


@triton.jit
def load_queries(
    queries, row, rows, kv_head, row_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[M, D]: `rows` positions' queries of one KV head, zeros around them."""
    channel = tl.arange(0, D)
    inside = (tl.arange(0, M) < rows * GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    at = _row_places(row, kv_head, row_stride, GROUP, HEAD_DIM, M)
    return tl.load(queries + at[:, None] + channel[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(
    out, acc, total, row, rows, kv_head, row_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The finished tile, where `load_queries` found its rows."""
    channel = tl.arange(0, D)
    inside = (tl.arange(0, M) < rows * GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    at = _row_places(row, kv_head, row_stride, GROUP, HEAD_DIM, M)
    total = tl.where(total == 0.0, 1.0, total)  # of padding
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] + channel[None, :], result, mask=inside)


@triton.jit
def _numbers(codes, like, FP8: tl.constexpr):
    if FP8:
        return codes.to(tl.float8e4nv, bitcast=True).to(like.dtype)
    return codes.to(like.dtype)


@triton.jit
def attend_tile(
    acc, highest, total, q, first, begin, end, positions, kv_head,
    keys, values, key_scales, value_scales, table, scale, window, sinks,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, KV_HEADS: tl.constexpr,
    SCALED: tl.constexpr, FP8: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sums of [M, D] queries after N more tokens. Not MASKED: every row sees every one of them."""
    token = first + tl.arange(0, N)
    channel = tl.arange(0, D)
    block = token // BLOCK_TOKENS
    offset = token - block * BLOCK_TOKENS
    if MASKED:
        inside = (token >= begin) & (token < end)
        slot = tl.load(table + block, mask=inside, other=0).to(tl.int64)
    else:
        slot = tl.load(table + block).to(tl.int64)
    at = ((slot * BLOCK_TOKENS + offset) * KV_HEADS + kv_head) * HEAD_DIM
    where = at[:, None] + channel[None, :]
    if MASKED:
        here = inside[:, None] & (channel < HEAD_DIM)[None, :]
        k = tl.load(keys + where, mask=here, other=0)
        v = tl.load(values + where, mask=here, other=0)
    elif D != HEAD_DIM:
        here = (channel < HEAD_DIM)[None, :]
        k = tl.load(keys + where, mask=here, other=0)
        v = tl.load(values + where, mask=here, other=0)
    else:
        k = tl.load(keys + where)
        v = tl.load(values + where)
    if SCALED:
        k = _numbers(k, q, FP8)
        v = _numbers(v, q, FP8)
        scale_at = (slot * KV_HEADS + kv_head) * BLOCK_TOKENS + offset
        if MASKED:
            of_keys = tl.load(key_scales + scale_at, mask=inside, other=0.0).to(tl.float32)
            of_values = tl.load(value_scales + scale_at, mask=inside, other=0.0).to(tl.float32)
        else:
            of_keys = tl.load(key_scales + scale_at).to(tl.float32)
            of_values = tl.load(value_scales + scale_at).to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SCALED:
        scores = scores * of_keys[None, :]
    if MASKED:
        seen = inside[None, :] & (token[None, :] <= positions[:, None])
        if WINDOWED:
            near = token[None, :] > positions[:, None] - window
            seen = seen & (near | (token < sinks)[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    now_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(now_highest == float("-inf"), 0.0, now_highest)
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(highest - base)
    total = total * keep + tl.sum(weights, 1)
    acc = acc * keep[:, None]
    if SCALED:
        weights = weights * of_values[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, now_highest, total
