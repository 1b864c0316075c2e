"""Keys by channel: 4 bits on the average, more where a channel needs them, less where it does not.

A key's outliers sit in channels and stay there (KIVI, arXiv 2402.02750), so each channel of a head has a
minimum and a range of its own over the block's tokens. Both are codes of 8 bits against bounds of the head.
Channels differ in range by far more than a bit is worth, so they are ranked by it: the upper 3/8 have 5
bits, the lower 3/8 have 3 (reverse water-filling, with bits whole and their number fixed). The ranking is
that of the stored ranges: it costs nothing to say. Every channel keeps its own nibble: the r-th of the
ranking puts its fifth bit into the top of the nibble of the r-th from the end.

Per layer and head, over channels c and tokens t:

    base    = short_below(min_c min_t x)       step = short((max_c min_t x - base) / 255)
    a_c     = clamp(floor((min_t x - base) * (1 / step)), 0, 255)        minimum m_c = a_c * step + base
    unit    = short(max_c (max_t x - m_c) / 255)
    b_c     = clamp(ceil((max_t x - m_c) * (1 / unit)), 0, 255)          range b_c * unit
    levels  = 31, 15 or 7, by the rank of b_c (greatest first, then the lesser channel)
    scale_c = short(b_c * unit * (1 / levels))
    code    = clamp(round((x - m_c) * (1 / scale_c)), 0, levels)
    x'      = code * scale_c + m_c             the product exact in float32, one rounding after it

    encoded   bounds  i16 [layer][kv_head][base, step, unit]
              a       u8  [layer][kv_head][head_dim]
              b       u8  [layer][kv_head][head_dim]
              codes   u8  [layer][token / 2][kv_head][head_dim]     token t in the low nibble, t + half above

4.52 bits an element at 32 tokens and head_dim 64. At the same size this loses half of what 4 bits for every
channel lose (docs/benchmarks.md).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstore.codecs.base import ENCODABLE_MIN
from kvstore.codecs.exact import (
    bytes_of,
    load_short,
    reciprocals,
    scales,
    short_above,
    short_below,
    store_short,
    the_torch,
)
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from torch import Tensor

GRID: Final = 255  # of minima and ranges
LENT: Final = (3, 8)  # the share of channels that lend a bit; as many borrow
LEVELS: Final = (31.0, 15.0, 7.0)  # above the minimum: of channels that borrow, that do neither, that lend
SHARES: Final = tuple(float(np.float32(1) / np.float32(n)) for n in LEVELS)
_TOP_BITS: Final = 0x88  # of both nibbles
_REST: Final = 0x77


def unfit(layout: KVLayout) -> str | None:
    if layout.block_tokens % 2 or layout.head_dim % LENT[1]:
        return f"block_tokens is odd or head_dim is no multiple of {LENT[1]}"
    return None


def nbytes(layout: KVLayout) -> int:
    per_channel = 2 + layout.block_tokens // 2
    return layout.layers * layout.kv_heads * (6 + layout.head_dim * per_channel)


def encode(x: Tensor, layout: KVLayout, into: memoryview) -> None:
    """Encode float32 keys [layer, token, kv_head, head_dim], all of them finite."""
    torch = the_torch()
    bounds, stored_a, stored_b, packed = _split(into, layout)
    least, most = x.amin(1), x.amax(1)
    base = short_below(least.amin(-1, keepdim=True))
    step = scales((least.amax(-1, keepdim=True) - base).clamp_min_(0), GRID)
    a = ((least - base) * reciprocals(step)).floor_().clamp_(0, GRID)
    ranges = (most - (a * step + base)).clamp_min_(0)
    unit = scales(ranges.amax(-1, keepdim=True), GRID)
    b = (ranges * reciprocals(unit)).ceil_().clamp_(0, GRID)
    store_short(torch.cat((base, step, unit), -1), bounds)
    stored_a.copy_(a)
    stored_b.copy_(b)
    ranking = _ranking(stored_b)
    minimum, scale = _grids(stored_a, stored_b, (base, step, unit), ranking)
    levels = _by_rank(ranking, LEVELS).unsqueeze(1)
    codes = (x - minimum).mul_(reciprocals(scale)).round_().clamp_(min=0)
    codes = torch.minimum(codes, levels).to(torch.uint8)
    _lend(codes, ranking)
    low, high = codes.chunk(2, dim=1)
    packed.copy_(low | (high << 4))


def decode(layout: KVLayout, encoded: memoryview, values: Tensor, name: str) -> None:
    """Fill float32 keys [layer, token, kv_head, head_dim]. Raises CorruptBlock."""
    torch = the_torch()
    bounds, stored_a, stored_b, packed = _split(encoded, layout)
    base, step, unit = load_short(bounds, name, signed=True).chunk(3, dim=-1)
    ranking = _ranking(stored_b)
    minimum, scale = _grids(stored_a, stored_b, (base, step.abs(), unit.abs()), ranking)
    borrowers, lenders = _partners(ranking, packed.shape)
    own = torch.full_like(stored_b, 0xFF).scatter_(-1, lenders[:, 0], _REST).unsqueeze(1)
    fifth = torch.zeros_like(packed)
    fifth.scatter_(-1, borrowers, packed.gather(-1, lenders) & _TOP_BITS)
    packed = packed & own
    low, high = values.chunk(2, dim=1)
    low.copy_((packed & 0x0F) | ((fifth & 0x08) << 1))
    high.copy_((packed >> 4) | ((fifth & 0x80) >> 3))
    values.mul_(scale).add_(minimum)


def _ranking(b: Tensor) -> Tensor:
    """Channels [layer, kv_head, head_dim], the greatest range first, of equal ones the lesser channel."""
    d = b.shape[-1]
    # Keys that are all different: numpy sorts 90 heads of 64 in 10 us, torch's stable sort takes 100.
    key = b.numpy().astype(np.int32) * d + np.arange(d - 1, -1, -1, dtype=np.int32)
    ranking: Tensor = the_torch().from_numpy(d - 1 - np.sort(key, axis=-1)[..., ::-1] % d)
    return ranking.long()


def _grids(
    a: Tensor, b: Tensor, bounds: tuple[Tensor, Tensor, Tensor], ranking: Tensor
) -> tuple[Tensor, Tensor]:
    """Each channel's minimum and scale: float32 [layer, 1, kv_head, head_dim]."""
    base, step, unit = bounds
    torch = the_torch()
    shares = _by_rank(ranking, SHARES)
    ranges = b.to(torch.float32) * unit
    scale = short_above(torch.where(ranges < ENCODABLE_MIN, 0.0, ranges) * shares)
    minimum = a.to(torch.float32).mul_(step).add_(base)
    return minimum.unsqueeze(1), scale.unsqueeze(1)


def _by_rank(ranking: Tensor, values: tuple[float, ...]) -> Tensor:
    """Float32 [layer, kv_head, head_dim]: for each channel the first, second or third of the values."""
    torch = the_torch()
    lent = _lent(ranking)
    by_rank = torch.full((ranking.shape[-1],), values[1])
    by_rank[:lent], by_rank[-lent:] = values[0], values[2]
    placed: Tensor = torch.empty(ranking.shape).scatter_(-1, ranking, by_rank.expand_as(ranking))
    return placed


def _lent(ranking: Tensor) -> int:
    return int(ranking.shape[-1]) * LENT[0] // LENT[1]


def _partners(ranking: Tensor, shape: Any) -> tuple[Tensor, Tensor]:
    """Channels that borrow and, at the same places, those that lend: [layer, token, kv_head, pair]."""
    lent = _lent(ranking)
    both = ranking[..., :lent], ranking[..., -lent:].flip(-1)
    borrowers, lenders = (one.unsqueeze(1).expand(*shape[:3], lent) for one in both)
    return borrowers, lenders


def _lend(codes: Tensor, ranking: Tensor) -> None:
    """Move the borrowers' fifth bits into the lenders' fourth."""
    borrowers, lenders = _partners(ranking, codes.shape)
    taken = codes.gather(-1, borrowers)
    codes.scatter_(-1, lenders, codes.gather(-1, lenders) | ((taken & 0x10) >> 1))
    codes.scatter_(-1, borrowers, taken & 0x0F)


def _split(encoded: memoryview, layout: KVLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounds int16 [layer, kv_head, 3], a and b uint8 [layer, kv_head, head_dim], codes uint8
    [layer, token / 2, kv_head, head_dim]: views."""
    data, heads, d = bytes_of(encoded), layout.layers * layout.kv_heads, layout.head_dim
    shape, sizes = (layout.layers, layout.kv_heads), (6 * heads, heads * d, heads * d)
    ends = list(itertools.accumulate(sizes))
    bounds, a, b = (data[end - size : end] for end, size in zip(ends, sizes, strict=True))
    packed = data[ends[-1] :].view(layout.layers, -1, layout.kv_heads, d)
    return bounds.view(the_torch().int16).view(*shape, 3), a.view(*shape, d), b.view(*shape, d), packed
