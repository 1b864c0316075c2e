"""Blocks between a pool and frames by Triton: many in one launch, quantised on the way if the pool is.

    pool     [layer][k, v][slot]   [token][kv_head][head_dim]
    frames   [block][layer][k, v]  [token][kv_head][head_dim]      payloads as kvstore/frame.py has them

A block is 2 x layers runs of memory in the pool and one in the frames; a program moves a piece of a run in
the widest words that divide it, so bytes are bytes whatever the dtype. Of a quantised pool the runs are rows
of head_dim: codes and scales have the bits of the codecs int8 and fp8, in torch and here.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from engine.pool import KVPool
from engine.quantised_pool import CODE_MAX, QuantisedPool
from kvstore.codecs.triton_exact import reciprocals, scales, settled
from kvstore.codecs.triton_rows import byte_codes, byte_values

__all__ = ["gather", "scatter", "write_rows"]

_WORDS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8)
_PIECE: Final = 1024  # words of a program: 8 KiB
_ROWS: Final = 16  # of a program, quantised
_BLOCKS_MAX: Final = 65_535  # of a launch: what a grid's last axis takes


@triton.jit
def _copy_runs(
    pool, frames, taken, run_words, slots, IN: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """Grid (pieces of a run, 2 x layers, blocks)."""
    run, block = tl.program_id(1), tl.program_id(2)
    slot = tl.load(taken + block).to(tl.int64)
    word = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    inside = word < run_words
    here = pool + (run.to(tl.int64) * slots + slot) * run_words + word
    there = frames + (block.to(tl.int64) * tl.num_programs(1) + run) * run_words + word
    if IN:
        tl.store(here, tl.load(there, mask=inside), mask=inside)
    else:
        tl.store(there, tl.load(here, mask=inside), mask=inside)


@triton.jit
def _store_coded(codes, scales_of, at, scale_at, inside, some, x, share, FP8: tl.constexpr):
    """Quantise rows x [R, D] (float32, zeros where there is nothing)."""
    scale = scales(tl.max(tl.abs(x), axis=1), share)
    code = byte_codes(x * reciprocals(scale)[:, None], FP8)
    tl.store(codes + at, code.to(tl.uint8).to(tl.int8, bitcast=True), mask=inside)
    tl.store(scales_of + scale_at, scale.to(tl.bfloat16), mask=some)


@triton.jit
def _code_blocks(
    codes, scales_of, frames, taken, share, slots, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of a run's rows, 2 x layers, blocks)."""
    run, block = tl.program_id(1), tl.program_id(2)
    slot = tl.load(taken + block).to(tl.int64)
    row = tl.program_id(0) * R + tl.arange(0, R)
    channel = tl.arange(0, D)
    some = row < TOKENS * HEADS
    inside = some[:, None] & (channel < HEAD_DIM)[None, :]
    within = row[:, None] * HEAD_DIM + channel[None, :]
    place = run.to(tl.int64) * slots + slot
    at = place * (TOKENS * HEADS * HEAD_DIM) + within
    scale_at = place * (TOKENS * HEADS) + row % HEADS * TOKENS + row // HEADS
    there = (block.to(tl.int64) * tl.num_programs(1) + run) * (TOKENS * HEADS * HEAD_DIM) + within
    if IN:
        x = tl.load(frames + there, mask=inside, other=0.0).to(tl.float32)
        _store_coded(codes, scales_of, at, scale_at, inside, some, x, share, FP8)
    else:
        code = tl.load(codes + at, mask=inside, other=0).to(tl.int32) & 0xFF
        scale = tl.load(scales_of + scale_at, mask=some, other=0.0).to(tl.float32)
        tl.store(frames + there, settled(byte_values(code, FP8) * scale[:, None], frames), mask=inside)


@triton.jit
def _code_rows(
    codes, scales_of, keys, values, pool_rows, rows, key_stride, value_stride,
    values_codes_at, values_scales_at, share,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of rows x heads, k and v), of one layer."""
    index = tl.program_id(0) * R + tl.arange(0, R)
    channel = tl.arange(0, D)
    some = index < rows * HEADS
    token, head = index // HEADS, index % HEADS
    inside = some[:, None] & (channel < HEAD_DIM)[None, :]
    pool_row = tl.load(pool_rows + token, mask=some, other=0)
    at = (pool_row * HEADS + head)[:, None] * HEAD_DIM + channel[None, :]
    scale_at = (pool_row // TOKENS * HEADS + head) * TOKENS + pool_row % TOKENS
    within = (head * HEAD_DIM)[:, None] + channel[None, :]
    if tl.program_id(1) == 0:
        x = tl.load(keys + token[:, None] * key_stride + within, mask=inside, other=0.0).to(tl.float32)
        _store_coded(codes, scales_of, at, scale_at, inside, some, x, share, FP8)
    else:
        x = tl.load(values + token[:, None] * value_stride + within, mask=inside, other=0.0).to(tl.float32)
        _store_coded(
            codes + values_codes_at, scales_of + values_scales_at, at, scale_at, inside, some, x, share, FP8
        )


def gather(pool: KVPool, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Blocks in `slots` (int32, on the device) to `out` [len(slots), layers, 2, block_tokens, kv_heads,
    head_dim] of the pool's dtype, contiguous."""
    _copy(pool, slots, out, into_pool=False)


def scatter(pool: KVPool, slots: torch.Tensor, source: torch.Tensor) -> None:
    """The way back. No slot twice: of two blocks for one slot, any mixture may win."""
    _copy(pool, slots, source, into_pool=True)


def write_rows(
    pool: QuantisedPool, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """`QuantisedPool.write` in one launch. Keys and values are contiguous in their last two axes."""
    codes, scale = pool.codes[layer], pool.scales[layer]
    grid = (triton.cdiv(len(rows) * pool.layout.kv_heads, _ROWS), 2)
    _code_rows[grid](
        codes, scale, keys, values, rows, len(rows), keys.stride(0), values.stride(0), codes[0].numel(),
        scale[0].numel(), _share(pool.hot), **_sizes(pool),
    )  # fmt: skip


def _copy(pool: KVPool, slots: torch.Tensor, frames: torch.Tensor, *, into_pool: bool) -> None:
    layout, runs = pool.layout, 2 * pool.layout.layers
    assert frames.is_contiguous(), "frames must be contiguous"
    for first in range(0, len(slots), _BLOCKS_MAX):
        taken, part = slots[first : first + _BLOCKS_MAX], frames[first : first + _BLOCKS_MAX]
        if isinstance(pool, QuantisedPool):
            grid = (triton.cdiv(layout.block_tokens * layout.kv_heads, _ROWS), runs, len(taken))
            _code_blocks[grid](
                pool.codes, pool.scales, part, taken, _share(pool.hot), pool.n_slots, **_sizes(pool),
                IN=into_pool,
            )  # fmt: skip
            continue
        run_nbytes = layout.block_nbytes // runs
        word = next(word for word in _WORDS if run_nbytes % word.itemsize == 0)
        words = run_nbytes // word.itemsize
        _copy_runs[(triton.cdiv(words, _PIECE), runs, len(taken))](
            _as_words(pool.data, word), _as_words(part, word), taken, words, pool.n_slots,
            IN=into_pool, PIECE=_PIECE,
        )  # fmt: skip


def _as_words(data: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    return data.view(-1).view(torch.uint8).view(word)


def _share(hot: str) -> float:
    return float(np.float32(1) / np.float32(CODE_MAX[hot]))


def _sizes(pool: QuantisedPool) -> dict[str, Any]:
    layout = pool.layout
    return {
        "TOKENS": layout.block_tokens,
        "HEADS": layout.kv_heads,
        "HEAD_DIM": layout.head_dim,
        "D": triton.next_power_of_2(layout.head_dim),
        "R": _ROWS,
        "FP8": pool.hot == "fp8",
        "enable_fp_fusion": False,
    }
