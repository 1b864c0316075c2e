"""Values rotated, then coded by levels that suit a bell curve, a scale for each token and head.

Rotated values are nearly Gaussian, whatever they were (TurboQuant, arXiv 2504.19874, after Lloyd and Max), so
levels lie closer together in the middle. They are integers: level(u) = u (alpha + u^2) of odd u, which is
within 3 % of the error of Lloyd's levels and costs three multiplications. Of several scales the encoder
takes the one with the least squared error, reckoned in integers, so that no order of sums matters.

    y       = H x                              hadamard.py
    amax    = short(max |y|)                   over head_dim
    z       = round(y * (1 / amax) * 2048)     integers
    of each reach k (in 64ths): T_k(j) = round(2048 * k / 64 * level(2j + 1) / level(2^bits - 1)),
                                j = how many midpoints, floor((T_k(j) + T_k(j+1)) / 2), are below |z|
    k       = the first with the least sum of (|z| - T_k(j))^2
    code    = 2^(bits-1) + j, or 2^(bits-1) - 1 - j where z < 0
    scale   = short(amax * (k / 64 / level(2^bits - 1) / 16))
    x'      = H level(2 code + 1 - 2^bits) * scale          the sum exact, one rounding after it

    encoded   scales  u16 [row]                upper halves of float32, row = [layer][token][kv_head]
              codes   u8  [row][head_dim / 2]  of 4 bits: channel j in the low nibble, j + head_dim / 2 above
              or      u8  [row][head_dim / 4]  of 3 bits, the lower two: channels j, j + head_dim / 4, ...
                      u8  [row][head_dim / 8]  and the third: channels j, j + head_dim / 8, ... from bit 0 up

`bits` and 16 / head_dim bits an element.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.codecs import hadamard
from kvstore.codecs.base import ENCODABLE_MIN
from kvstore.codecs.exact import (
    bytes_of,
    load_short,
    multiplied,
    reciprocals,
    short_above,
    store_short,
    the_torch,
)
from kvstore.codecs.words import Bytes, Words, fields, words
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from torch import Tensor

Z_MAX: Final = 2048
_TO_EVEN: Final = 12582912.0
"""1.5 * 2**23: what it is added to is rounded half to even, and is an integer in the lower bits."""
_TO_EVEN_BITS: Final = 0x4B400000
_LOW: Final = 1 << 12  # what parts squared distances
PLANES: Final = {4: ((4, 0),), 3: ((2, 0), (1, 2))}
"""How codes of so many bits are cut: (bits of a plane, which of the code's it begins at)."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The shape of a code: its bits, what bends its levels, and how far they may reach."""

    bits: int
    alpha: int
    reaches: tuple[int, ...]  # of the greatest level, in 64ths of the greatest magnitude

    @property
    def greatest(self) -> int:
        """The level of the greatest code."""
        u = (1 << self.bits) - 1
        return u * (self.alpha + u * u)

    def targets(self, reach: int) -> list[int]:
        """T_k(j) for every j."""
        odd = range(1, 1 << self.bits, 2)
        top = 64 * self.greatest
        return [(2 * Z_MAX * reach * u * (self.alpha + u * u) + top) // (2 * top) for u in odd]

    def per_amax(self, reach: int) -> float:
        """What a scale is of the greatest magnitude, as a float32."""
        return float(np.float32(reach / (64 * self.greatest * hadamard.SIZE)))


FOUR_BITS: Final = Levels(4, 600, (70, 64, 59, 54, 49, 44))
THREE_BITS: Final = Levels(3, 188, (64, 59, 54, 49, 44, 38))


def unfit(layout: KVLayout) -> str | None:
    return f"head_dim is no multiple of {hadamard.SIZE}" if layout.head_dim % hadamard.SIZE else None


def _rows(layout: KVLayout) -> int:
    return layout.layers * layout.block_tokens * layout.kv_heads


def nbytes(layout: KVLayout, levels: Levels) -> int:
    return _rows(layout) * (2 + layout.head_dim * levels.bits // 8)


def encode(x: Tensor, layout: KVLayout, levels: Levels, into: memoryview) -> None:
    """Encode float32 values [row, head_dim], all of them finite.

    What the search asks of a number depends on z alone, so it is looked up: a row's sums are a bag of rows
    of a table.
    """
    torch = the_torch()
    y = hadamard.rotated(x)
    amax = short_above(torch.maximum(y.amax(-1, keepdim=True), -y.amin(-1, keepdim=True)))
    amax = torch.where(amax < ENCODABLE_MIN, 0.0, amax)
    y.mul_(reciprocals(amax) * float(Z_MAX)).add_(_TO_EVEN)  # a power of two: it is the same product
    z = y.view(torch.int32).sub_(_TO_EVEN_BITS - Z_MAX)  # from 0 on
    errors, codes_of_z = _searched(levels)
    sums = torch.nn.functional.embedding_bag(z, errors, mode="sum").to(torch.int32)
    reaches = len(levels.reaches)
    best = np.argmin((sums[:, :reaches] + sums[:, reaches : 2 * reaches] * _LOW).numpy(), axis=1)
    best = torch.from_numpy(best).to(torch.int32).unsqueeze(1)
    per_amax = torch.tensor([levels.per_amax(reach) for reach in levels.reaches])
    data = bytes_of(into)
    store_short(short_above(amax * per_amax[best]), _stored_scales(data, layout))
    z.add_(best, alpha=2 * Z_MAX + 1)
    codes = codes_of_z.index_select(0, z.reshape(-1)).numpy().reshape(z.shape)
    for bits, first, plane in _planes(data, layout, levels):
        parts = np.split(codes, 8 // bits, axis=1)
        packed = np.zeros_like(parts[0])
        for i, part in enumerate(parts):
            packed |= ((part >> first) & ((1 << bits) - 1)) << (i * bits)
        plane.numpy()[:] = packed


def decode(layout: KVLayout, levels: Levels, encoded: memoryview, target: Tensor, name: str) -> None:
    """Fill values [layer, token, kv_head, head_dim] of the layout's dtype. Raises CorruptBlock.

    Channels stay in the runs they are packed in until the last product, if the rotation fits into a run.
    """
    data = bytes_of(encoded)
    scale = load_short(_stored_scales(data, layout), name)
    codes = _unpacked(data, layout, levels)
    if codes.shape[-1] % hadamard.SIZE:
        codes = codes.transpose(1, 0, 2).reshape(1, len(scale), layout.head_dim)
    values = hadamard.rotated_levels(codes, _of_codes(levels))
    by_layer = (layout.layers, -1, len(codes), codes.shape[-1])
    rows = values.view(len(codes), layout.layers, -1, codes.shape[-1]).permute(1, 2, 0, 3)
    multiplied(rows, scale.view(layout.layers, -1, 1, 1), target.view(by_layer))


def _unpacked(data: Tensor, layout: KVLayout, levels: Levels) -> Bytes:
    """Codes: [run, row, channel of the run]."""
    rows, part = _rows(layout), layout.head_dim // 8
    codes: Words | None = None
    for bits, first, plane in _planes(data, layout, levels):
        packed = words(plane.numpy().copy(), part)  # in memory of its own it is aligned
        cut = fields(packed, bits)
        if codes is None:
            codes = cut
        else:  # a plane of fewer bits has shorter runs: some of them are one of the first plane's
            cut <<= first
            width = cut.shape[-1]
            of_runs = cut.reshape(len(codes), -1, rows, width).swapaxes(1, 2)
            codes.reshape(len(codes), rows, -1, width)[:] |= of_runs
    assert codes is not None
    return codes.view(np.uint8)


@functools.cache
def _of_codes(levels: Levels) -> tuple[int, ...]:
    """The level of each code."""
    odd = range(1 - (1 << levels.bits), 1 << levels.bits, 2)
    return tuple(u * (levels.alpha + u * u) for u in odd)


@functools.cache
def _searched(levels: Levels) -> tuple[Tensor, Tensor]:
    """Of every z from -Z_MAX on: squared distances, float32 [z, reaches' lower parts, upper parts, nothing]
    (a table's row is whole vectors), and codes, uint8 [reach and z].

    Squares are parted, so that sums of float32 are exact (4,096 of them below 2**12 are) in any order.
    """
    torch = the_torch()
    z = np.arange(-Z_MAX, Z_MAX + 1)
    half, reaches = 1 << (levels.bits - 1), len(levels.reaches)
    errors = np.zeros((len(z), -(-2 * reaches // 8) * 8), dtype=np.float32)
    codes = np.empty((reaches, len(z)), dtype=np.uint8)
    for k, reach in enumerate(levels.reaches):
        targets = levels.targets(reach)
        borders = [(below + above) // 2 for below, above in itertools.pairwise(targets)]
        j = np.searchsorted(borders, abs(z))  # how many are below
        squares = np.square(abs(z) - np.array(targets)[j])
        errors[:, k], errors[:, reaches + k] = squares % _LOW, squares // _LOW
        codes[k] = np.where(z < 0, half - 1 - j, half + j)
    return torch.from_numpy(errors), torch.from_numpy(codes.ravel())


def _stored_scales(data: Tensor, layout: KVLayout) -> Tensor:
    """int16 [row, 1], a view."""
    scales: Tensor = data[: 2 * _rows(layout)].view(the_torch().int16).view(-1, 1)
    return scales


def _planes(data: Tensor, layout: KVLayout, levels: Levels) -> Iterator[tuple[int, int, Tensor]]:
    """(bits, which bit of the code they begin at, uint8 [row, head_dim * bits / 8]), views."""
    rows = _rows(layout)
    start = 2 * rows
    for bits, first in PLANES[levels.bits]:
        end = start + rows * layout.head_dim * bits // 8
        yield bits, first, data[start:end].view(rows, -1)
        start = end
