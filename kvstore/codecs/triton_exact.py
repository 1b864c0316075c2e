"""exact.py and hadamard.py for Triton: the same formulas, in the same order, bit for bit.

Importing needs triton. Kernels are launched without fused multiply-add (`enable_fp_fusion=False`): where a
product is rounded before it is added to something, it must be. Division is `div_rn`: CUDA's plain one is not
correctly rounded. Tiles have sizes that are powers of two, so head_dim must be one.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

import triton
import triton.language as tl

MIN = tl.constexpr(2.0**-100)
TO_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no room for a fraction


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def short_above(x):
    return float_of((bits_of(x) + 0xFFFF) & -65536)


@triton.jit
def short_below(x):
    bits = bits_of(tl.where(tl.abs(x) < MIN, 0.0, x))
    return float_of(tl.where(bits < 0, bits + 0xFFFF, bits) & -65536)


@triton.jit
def scales(ranges, share):
    """`share` is the float32 nearest to 1 / steps."""
    return short_above(tl.where(ranges < MIN, 0.0, ranges) * share)


@triton.jit
def reciprocals(scale):
    some = scale > 0
    safe = tl.where(some, scale, 1.0)
    return tl.where(some, tl.div_rn(safe * 0 + 1.0, safe), 0.0)


@triton.jit
def rounded(x):
    """Half to even, for magnitudes below 2**22; beyond, something beyond."""
    return (x + TO_EVEN) - TO_EVEN


@triton.jit
def upper_half(x):
    return (bits_of(x) >> 16).to(tl.int16)


@triton.jit
def of_upper_half(stored):
    return float_of(stored.to(tl.int32) << 16)


@triton.jit
def rotated(x, M: tl.constexpr, D: tl.constexpr):
    """H x of [M, D] in blocks of 16, unnormalised: sums and differences 8, 4, 2 and 1 apart."""
    for stage in tl.static_range(4):
        half: tl.constexpr = 8 >> stage
        groups: tl.constexpr = M * D // (2 * half)
        first, second = tl.split(tl.permute(tl.reshape(x, (groups, 2, half)), (0, 2, 1)))
        joined = tl.join(first + second, first - second)
        x = tl.reshape(tl.permute(joined, (0, 2, 1)), (M, D))
    return x


@triton.jit
def packed(codes, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """[M, D] codes of BITS bits as [M, D * BITS / 8] bytes: channels in runs, one above the other."""
    parts: tl.constexpr = 8 // BITS
    shifts = (tl.arange(0, parts) * BITS)[None, :, None]
    return tl.sum(tl.reshape(codes, (M, parts, D // parts)) << shifts, axis=1)


@triton.jit
def unpacked(data, M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    parts: tl.constexpr = 8 // BITS
    shifts = (tl.arange(0, parts) * BITS)[None, :, None]
    spread = (data.to(tl.int32)[:, None, :] >> shifts) & ((1 << BITS) - 1)
    return tl.reshape(spread, (M, D))


@triton.jit
def settled(values, out):
    """float32 rounded half to even to what `out` points at; bfloat16 by hand, for interpreters cut it off."""
    if out.dtype.element_ty == tl.float16:
        values = tl.minimum(tl.maximum(values, -65504.0), 65504.0)
    if out.dtype.element_ty == tl.bfloat16:
        bits = bits_of(values)
        values = float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
    return values.to(out.dtype.element_ty)
