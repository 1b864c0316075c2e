"""Triton kernels of the codecs whose unit is a row of head_dim: int8, fp8, int4 and int4-hadamard.

A program takes R rows. `data` is the encoded block as bytes, `shorts` the same memory as int16; formulas and
layout are those of the codecs' own files.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

import triton
import triton.language as tl

from kvstore.codecs.triton_exact import (
    bits_of,
    float_of,
    of_upper_half,
    packed,
    reciprocals,
    rotated,
    rounded,
    scales,
    settled,
    short_below,
    unpacked,
    upper_half,
)


@triton.jit
def byte_codes(y, FP8: tl.constexpr):
    """int32, 0 to 255: the bits of e4m3 or int8 numbers nearest to `y` (float32, already scaled)."""
    if FP8:
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
        bits = bits_of(y)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        tiny = rounded(float_of(magnitude) * 512.0).to(tl.int32)
        code = tl.where(magnitude < (121 << 23), tiny, normal) | ((bits >> 24) & 0x80)
    else:
        code = tl.minimum(tl.maximum(rounded(y), -127.0), 127.0).to(tl.int32) & 0xFF
    return code


@triton.jit
def byte_values(code, FP8: tl.constexpr):
    """float32 of what `byte_codes` gives."""
    if FP8:
        magnitude = code & 0x7F
        normal = float_of((magnitude << 20) + (120 << 23))
        value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
        value = tl.where(code >= 0x80, -value, value)
    else:
        value = tl.where(code >= 0x80, code - 256, code).to(tl.float32)
    return value


@triton.jit
def encode_bytes(x_ptr, data, shorts, rows, share, D: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = scales(tl.max(tl.abs(x), axis=1), share)
    tl.store(shorts + row, upper_half(scale), mask=inside)
    code = byte_codes(x * reciprocals(scale)[:, None], FP8)
    tl.store(data + 2 * rows + at, code.to(tl.uint8), mask=inside[:, None])


@triton.jit
def decode_bytes(data, shorts, out, rows, D: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    code = tl.load(data + 2 * rows + at, mask=inside[:, None], other=0).to(tl.int32)
    scale = of_upper_half(tl.load(shorts + row, mask=inside, other=0))
    value = settled(byte_values(code, FP8) * scale[:, None], out)
    tl.store(out + at, value, mask=inside[:, None])


@triton.jit
def encode_nibbles(x_ptr, data, shorts, rows, share, D: tl.constexpr, R: tl.constexpr, ROTATE: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    if ROTATE:
        x = rotated(x, R, D)
    minimum = short_below(tl.min(x, axis=1))
    scale = scales(tl.maximum(tl.max(x, axis=1) - minimum, 0.0), share)
    tl.store(shorts + row, upper_half(scale), mask=inside)
    tl.store(shorts + rows + row, upper_half(minimum), mask=inside)
    code = rounded((x - minimum[:, None]) * reciprocals(scale)[:, None])
    code = tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)
    half = row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    tl.store(data + 4 * rows + half, packed(code, R, D, 4).to(tl.uint8), mask=inside[:, None])


@triton.jit
def decode_nibbles(data, shorts, out, rows, D: tl.constexpr, R: tl.constexpr, ROTATE: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    half = row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    stored = tl.load(data + 4 * rows + half, mask=inside[:, None], other=0)
    scale = of_upper_half(tl.load(shorts + row, mask=inside, other=0))[:, None]
    minimum = of_upper_half(tl.load(shorts + rows + row, mask=inside, other=0))[:, None]
    code = unpacked(stored, R, D, 4).to(tl.float32)
    channel = tl.arange(0, D)[None, :]
    if ROTATE:
        value = rotated(code, R, D) * (scale * 0.0625)
        value = tl.where(channel % 16 == 0, value + minimum, value)
    else:
        value = code * scale + minimum
    at = row[:, None] * D + channel
    tl.store(out + at, settled(value, out), mask=inside[:, None])
