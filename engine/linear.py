"""Matrix products whose bits do not depend on how many rows there are: half of batch invariance.

`F.linear` takes other kernels for few rows than for many, splits rows over threads, and packs the weight
anew in every call. oneDNN and FBGEMM pack a weight once, and what they then compute for a row is the same to
the bit in any company: measured for 1 to 700 rows, 1 to 8 threads and 14 shapes up to 49,152 x 576, odd ones
included (AVX2, torch 2.13).

    float16, FBGEMM    where every weight is a float16 times one power of two, as all bfloat16 are but for an
                       extreme few: half the bytes, widened as they are read, products and sums in float32.
                       Nothing is rounded. Few rows are bound by reading weights: 1 row takes 0.5 of the time,
                       16 rows 0.6, 64 rows 0.75 (docs/benchmarks.md)
    float32, oneDNN    everywhere else

FBGEMM has kernels for up to six rows, of which those for one and two round otherwise: rows are filled up to
a number that it cuts into none of these. bfloat16 rows are widened, multiplied in float32 and rounded once:
without native bfloat16 this is twenty times faster than the type's own product, and as invariant.

What was measured on one machine is not law on another: `check_row_invariance` proves it at load, for the
shapes and threads at hand, or refuses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from kvstore.errors import ConfigError

__all__ = ["Linear", "PackedLinear", "Rowwise", "check_row_invariance", "variant"]

_PROBE_ROWS: Final = (1, 2, 3, 4, 5, 6, 7, 16, 33, 129)
_PROBE_ROWS_MAX: Final = 272
_ELEMENTS_A_THREAD: Final = 1 << 16
"""Twice torch's grain, so that every number of shares from one to all threads occurs."""
_BLOCK_ROWS_MIN, _BLOCK_ROWS = 3, 6  # of FBGEMM's kernels
_HALF_MAX: Final = torch.finfo(torch.float16).max
_ELEMENTS_A_LOOK: Final = 1 << 20
_HALF_EXPONENT_MAX: Final = 100  # of the power of two: far from where it, or what it scales, is no float32


class Rowwise(NamedTuple):
    """A function of rows, elementwise or a norm, as it is used: on rows of which width and type."""

    function: Callable[[torch.Tensor], torch.Tensor]
    width: int
    dtype: torch.dtype


class Linear(Protocol):
    """Weights [out, in], one below the other, and a bias [out], as one product."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out], contiguous, in the dtype of `rows`."""
        ...


class PackedLinear:
    """Weights [out, in], one below the other, as one product, and a bias [out] of all of them."""

    __slots__ = ("_bias", "_packed", "_unscale", "in_features", "is_half", "out_features")

    def __init__(self, *weights: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        whole = torch.cat([weight.float() for weight in weights])
        self.out_features, self.in_features = whole.shape
        scale = _scale_to_half(whole) if has_half_products() else None
        self.is_half = scale is not None
        self._bias = None if bias is None else bias.float()
        if scale is not None:
            self._packed = torch.ops.quantized.linear_prepack_fp16(whole.mul_(scale), None)
            self._unscale = 1 / scale
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(whole, None)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out], contiguous, in the dtype of `rows`."""
        product: torch.Tensor
        if self.is_half:
            missing = _filled(len(rows)) - len(rows)
            filled = F.pad(rows.float(), (0, 0, 0, missing)) if missing else rows.float()
            product = torch.ops.quantized.linear_dynamic_fp16(filled, self._packed)[: len(rows)]
            if self._unscale != 1:
                product.mul_(self._unscale)
            if self._bias is not None:
                product.add_(self._bias)
        else:
            product = torch.ops.mkldnn._linear_pointwise(
                rows.float(), self._packed, self._bias, "none", [], ""
            )
        return product.to(rows.dtype)


@functools.cache
def has_half_products() -> bool:
    """Does this build of torch have them, and are they invariant on this machine, whose vectors may be wider
    than those this was measured with?"""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(64, 100, generator=generator).half().float(), torch.randn(60, 100)
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def product(count: int) -> torch.Tensor:
        filled = F.pad(rows[:count], (0, 0, 0, _filled(count) - count))
        return torch.ops.quantized.linear_dynamic_fp16(filled, packed)[:count]  # type: ignore[no-any-return]

    whole = product(len(rows))
    return all(torch.equal(product(count), whole[:count]) for count in range(1, len(rows)))


def _filled(rows: int) -> int:
    """The next count that FBGEMM cuts into blocks of three to six rows."""
    return max(rows, _BLOCK_ROWS_MIN) if rows <= _BLOCK_ROWS else -(-rows // _BLOCK_ROWS) * _BLOCK_ROWS


def _scale_to_half(weights: torch.Tensor) -> float | None:
    """The power of two that makes all of them exact in float16; None if there is none."""
    highest = float(weights.abs().max())
    if not 0 < highest < math.inf:
        return None
    exponent = math.floor(math.log2(_HALF_MAX / highest))
    if abs(exponent) > _HALF_EXPONENT_MAX:
        return None
    scale = 2.0**exponent
    for part in torch.split(weights, max(1, _ELEMENTS_A_LOOK // weights.shape[1])):
        scaled = part * scale
        if not torch.equal(scaled.half().float(), scaled):
            return None
    return scale


def check_row_invariance(linears: Iterable[PackedLinear], rowwise: Iterable[Rowwise]) -> None:
    """Prove on this machine, with its threads, that a row's bits do not depend on what is computed with it:
    for products, and for functions of whole rows.

    About 0.5 s for SmolLM2-135M. Raises ConfigError.
    """
    generator = torch.Generator().manual_seed(0)
    for linear in {(lin.out_features, lin.in_features, lin.is_half): lin for lin in linears}.values():
        x = torch.randn(_PROBE_ROWS_MAX, linear.in_features, generator=generator)
        whole = linear(x)
        for rows in _PROBE_ROWS:
            if not torch.equal(linear(x[-rows:]), whole[-rows:]):
                shape = f"{linear.out_features} x {linear.in_features}"
                raise variant(f"a product of {rows} rows with a {shape} matrix")
    elements_max = torch.get_num_threads() * _ELEMENTS_A_THREAD
    for function, width, dtype in rowwise:
        x = torch.randn(-(-elements_max // width), width, generator=generator).to(dtype)
        whole = function(x)
        for rows in range(1, x.shape[0]):
            if not torch.equal(function(x[:rows]), whole[:rows]):
                raise variant(f"{function.__name__} of {rows} rows of {width} elements")


def variant(what: str) -> ConfigError:
    """The refusal to compute where batch invariance does not hold."""
    return ConfigError(
        f"{what} gives other bits than the same within a larger batch, on this machine with "
        f"{torch.get_num_threads()} threads: set threads to 1 or 2, or batch_invariant to false"
    )
