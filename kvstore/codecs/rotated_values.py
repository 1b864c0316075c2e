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
    reciprocals,
    short_above,
    store_short,
    the_torch,
)
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from torch import Tensor

Z_MAX: Final = 2048
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
    """Encode float32 values [row, head_dim], all of them finite."""
    torch = the_torch()
    y = hadamard.rotated(x)
    amax = short_above(y.abs().amax(-1, keepdim=True))
    amax = torch.where(amax < ENCODABLE_MIN, 0.0, amax)
    z = ((y * reciprocals(amax)) * float(Z_MAX)).round_().to(torch.int32)
    magnitude, half = z.abs().to(torch.int16), 1 << (levels.bits - 1)
    least: Tensor | None = None
    for reach in levels.reaches:
        j, error = _nearest(magnitude, levels.targets(reach))
        scale = short_above(amax * levels.per_amax(reach))
        if least is None:
            least, best_j, best_scale = error, j, scale
            continue
        better = error < least
        least = torch.where(better, error, least)
        best_j = torch.where(better, j, best_j)
        best_scale = torch.where(better, scale, best_scale)
    codes = torch.where(z < 0, half - 1 - best_j, half + best_j).to(torch.uint8)
    data = bytes_of(into)
    store_short(best_scale, _stored_scales(data, layout))
    for bits, first, plane in _planes(data, layout, levels):
        plane.zero_()
        for i, part in enumerate(codes.chunk(8 // bits, dim=1)):
            plane.bitwise_or_(((part >> first) & ((1 << bits) - 1)) << (i * bits))


def decode(layout: KVLayout, levels: Levels, encoded: memoryview, name: str) -> Tensor:
    """Float32 values [row, head_dim]. Raises CorruptBlock."""
    torch = the_torch()
    data = bytes_of(encoded)
    scale = load_short(_stored_scales(data, layout), name)
    codes = torch.empty(len(scale), layout.head_dim, dtype=torch.uint8)
    for bits, first, plane in _planes(data, layout, levels):
        for i, part in enumerate(codes.chunk(8 // bits, dim=1)):
            some = (plane >> (i * bits)) & ((1 << bits) - 1)
            if first:
                part.bitwise_or_(some << first)
            else:
                part.copy_(some)
    odd = codes.to(torch.int16).mul_(2).sub_((1 << levels.bits) - 1)
    level = (odd * odd).add_(levels.alpha).mul_(odd).to(torch.float32)
    values = torch.empty(level.shape)
    hadamard.rotated_codes(level, values)
    decoded: Tensor = values.mul_(scale)
    return decoded


def _nearest(magnitude: Tensor, targets: list[int]) -> tuple[Tensor, Tensor]:
    """The nearest target of each magnitude (int16), and a row's sum of squared distances (int32)."""
    torch = the_torch()
    j = torch.zeros_like(magnitude)
    chosen = torch.full_like(magnitude, targets[0])
    for below, above in itertools.pairwise(targets):
        beyond = (magnitude > (below + above) // 2).to(torch.int16)  # as a bool it would make int64 of all
        j.add_(beyond)
        chosen.add_(beyond, alpha=above - below)
    distance = (magnitude - chosen).to(torch.int32)
    return j, (distance * distance).sum(-1, keepdim=True, dtype=torch.int32)


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
