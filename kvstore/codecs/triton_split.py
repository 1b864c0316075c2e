"""Triton kernels of k4v4 and k4v3: keys by channel (a program a layer and head), values by row.

Formulas and layout are those of channel_keys.py and rotated_values.py. `keys` and `values` are what their
parts of the encoded block are as bytes, `..._shorts` the same memory as int16. In the block itself the
values of a layer follow its keys.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

import triton
import triton.language as tl

from kvstore.codecs.triton_exact import (
    MIN,
    of_upper_half,
    packed,
    reciprocals,
    rotated,
    rounded,
    scales,
    settled,
    short_above,
    short_below,
    unpacked,
    upper_half,
)

_31 = tl.constexpr(0.032258063554763794)  # float32 nearest to 1 / 31, 1 / 15, 1 / 7, 1 / 255
_15 = tl.constexpr(0.06666667014360428)
_7 = tl.constexpr(0.1428571492433548)
_255 = tl.constexpr(0.003921568859368563)


@triton.jit
def _ranked(b, D: tl.constexpr):
    """Each channel's rank and the channel whose rank is as far from the other end."""
    channel = tl.arange(0, D)
    key = b * D + (D - 1 - channel)
    rank = tl.sum((key[None, :] > key[:, None]).to(tl.int32), axis=1)
    opposite = (rank[None, :] + rank[:, None]) == D - 1
    return rank, tl.sum(tl.where(opposite, channel[None, :], 0), axis=1)


@triton.jit
def _grids(a, b, base, step, unit, rank, D: tl.constexpr, LENT: tl.constexpr):
    borrows, lends = rank < LENT, rank >= D - LENT
    share = tl.where(borrows, _31, tl.where(lends, _7, _15))
    levels = tl.where(borrows, 31.0, tl.where(lends, 7.0, 15.0))
    scale = scales(b.to(tl.float32) * unit, share)
    return a.to(tl.float32) * step + base, scale, levels


@triton.jit
def encode_keys(
    x_ptr, keys, shorts, heads, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, LENT: tl.constexpr
):
    unit_id = tl.program_id(0)
    layer, head = unit_id // H, unit_id % H
    channel = tl.arange(0, D)
    token = tl.arange(0, T)[:, None]
    x = tl.load(x_ptr + ((layer * 2 * T + token) * H + head) * D + channel[None, :]).to(tl.float32)
    least, most = tl.min(x, axis=0), tl.max(x, axis=0)
    base = short_below(tl.min(least, axis=0))
    step = scales(tl.maximum(tl.max(least, axis=0) - base, 0.0), _255)
    a = tl.minimum(tl.maximum(tl.floor((least - base) * reciprocals(step)), 0.0), 255.0)
    ranges = tl.maximum(most - (a * step + base), 0.0)
    unit = scales(tl.max(ranges, axis=0), _255)
    b = tl.minimum(tl.maximum(tl.ceil(ranges * reciprocals(unit)), 0.0), 255.0).to(tl.int32)
    tl.store(shorts + 3 * unit_id, upper_half(base))
    tl.store(shorts + 3 * unit_id + 1, upper_half(step))
    tl.store(shorts + 3 * unit_id + 2, upper_half(unit))
    tl.store(keys + 6 * heads + unit_id * D + channel, a.to(tl.uint8))
    tl.store(keys + (6 + D) * heads + unit_id * D + channel, b.to(tl.uint8))
    rank, partner = _ranked(b, D)
    minimum, scale, levels = _grids(a, b, base, step, unit, rank, D, LENT)
    code = rounded((x - minimum[None, :]) * reciprocals(scale)[None, :])
    code = tl.minimum(tl.maximum(code, 0.0), levels[None, :]).to(tl.int32)
    partners = tl.broadcast_to(partner[None, :], (T, D))
    lent = (tl.gather(code, partners, 1) & 16) >> 1
    nibble = tl.where((rank >= D - LENT)[None, :], code | lent, code & 15)
    both = tl.sum(tl.reshape(nibble, (2, T // 2, D)) << (4 * tl.arange(0, 2))[:, None, None], axis=0)
    half = tl.arange(0, T // 2)[:, None]
    at = ((layer * (T // 2) + half) * H + head) * D + channel[None, :]
    tl.store(keys + (6 + 2 * D) * heads + at, both.to(tl.uint8))


@triton.jit
def decode_keys(
    keys, shorts, out, heads, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, LENT: tl.constexpr
):  # fmt: skip
    unit_id = tl.program_id(0)
    layer, head = unit_id // H, unit_id % H
    channel = tl.arange(0, D)
    base = of_upper_half(tl.load(shorts + 3 * unit_id))
    step = of_upper_half(tl.load(shorts + 3 * unit_id + 1))
    unit = of_upper_half(tl.load(shorts + 3 * unit_id + 2))
    a = tl.load(keys + 6 * heads + unit_id * D + channel).to(tl.int32)
    b = tl.load(keys + (6 + D) * heads + unit_id * D + channel).to(tl.int32)
    rank, partner = _ranked(b, D)
    minimum, scale, _levels = _grids(a, b, base, step, unit, rank, D, LENT)
    half = tl.arange(0, T // 2)[:, None]
    at = ((layer * (T // 2) + half) * H + head) * D + channel[None, :]
    both = tl.load(keys + (6 + 2 * D) * heads + at).to(tl.int32)
    nibble = tl.reshape((both[None, :, :] >> (4 * tl.arange(0, 2))[:, None, None]) & 15, (T, D))
    fifth = (tl.gather(nibble, tl.broadcast_to(partner[None, :], (T, D)), 1) & 8) << 1
    code = tl.where((rank < LENT)[None, :], nibble | fifth, nibble)
    code = tl.where((rank >= D - LENT)[None, :], nibble & 7, code)
    value = settled(code.to(tl.float32) * scale[None, :] + minimum[None, :], out)
    token = tl.arange(0, T)[:, None]
    to = out + ((layer * 2 * T + token) * H + head) * D + channel[None, :]
    tl.store(to, value)


@triton.jit
def encode_values(
    x_ptr, values, shorts, targets, per_amax, rows, LAYER_ROWS: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, BITS: tl.constexpr, REACHES: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    in_block = row + (row // LAYER_ROWS + 1) * LAYER_ROWS
    at = in_block[:, None] * D + tl.arange(0, D)[None, :]
    y = rotated(tl.load(x_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32), R, D)
    amax = short_above(tl.max(tl.abs(y), axis=1))
    amax = tl.where(amax < MIN, 0.0, amax)
    z = rounded((y * reciprocals(amax)[:, None]) * 2048.0).to(tl.int32)
    magnitude, J = tl.abs(z), 1 << (BITS - 1)
    least = tl.full((R,), 0x7FFFFFFF, tl.int32)
    best = tl.zeros((R, D), tl.int32)
    best_scale = tl.zeros((R,), tl.float32)
    for reach in tl.static_range(REACHES):
        j = tl.zeros((R, D), tl.int32)
        below = tl.load(targets + reach * J)
        chosen = j + below
        for i in tl.static_range((1 << (BITS - 1)) - 1):
            above = tl.load(targets + reach * J + i + 1)
            beyond = (magnitude > ((below + above) >> 1)).to(tl.int32)
            j += beyond
            chosen += beyond * (above - below)
            below = above
        error = tl.sum((magnitude - chosen) * (magnitude - chosen), axis=1)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better[:, None], j, best)
        best_scale = tl.where(better, short_above(amax * tl.load(per_amax + reach)), best_scale)
    code = tl.where(z < 0, J - 1 - best, J + best)
    tl.store(shorts + row, upper_half(best_scale), mask=inside)
    mask = inside[:, None]
    if BITS == 4:
        to = values + 2 * rows + row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        tl.store(to, packed(code, R, D, 4).to(tl.uint8), mask=mask)
    else:
        to = values + 2 * rows + row[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :]
        tl.store(to, packed(code & 3, R, D, 2).to(tl.uint8), mask=mask)
        to = values + (2 + D // 4) * rows + row[:, None] * (D // 8) + tl.arange(0, D // 8)[None, :]
        tl.store(to, packed(code >> 2, R, D, 1).to(tl.uint8), mask=mask)


@triton.jit
def decode_values(
    values, shorts, out, rows, alpha, LAYER_ROWS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BITS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    mask = inside[:, None]
    if BITS == 4:
        at = values + 2 * rows + row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        code = unpacked(tl.load(at, mask=mask, other=0), R, D, 4)
    else:
        at = values + 2 * rows + row[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :]
        code = unpacked(tl.load(at, mask=mask, other=0), R, D, 2)
        at = values + (2 + D // 4) * rows + row[:, None] * (D // 8) + tl.arange(0, D // 8)[None, :]
        code += unpacked(tl.load(at, mask=mask, other=0), R, D, 1) << 2
    odd = 2 * code + 1 - (1 << BITS)
    level = rotated((odd * (odd * odd + alpha)).to(tl.float32), R, D)
    scale = of_upper_half(tl.load(shorts + row, mask=inside, other=0))
    value = settled(level * scale[:, None], out)
    in_block = row + (row // LAYER_ROWS + 1) * LAYER_ROWS
    to = out + in_block[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(to, value, mask=mask)
