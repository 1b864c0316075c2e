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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.base import ENCODABLE_MIN
from kvstore.codecs.exact import (
    bytes_of,
    load_short,
    reciprocals,
    scales,
    settle,
    short_above,
    short_below,
    store_short,
    the_torch,
)
from kvstore.codecs.words import Bytes, Words, field, fields, words
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from torch import Tensor

GRID: Final = 255  # of minima and ranges
LENT: Final = (3, 8)  # the share of channels that lend a bit; as many borrow
LEVELS: Final = np.array([31, 15, 7], dtype=np.float32)
"""Above the minimum: of channels that borrow, that do neither, that lend."""
SHARES: Final = np.float32(1) / LEVELS
_OWN: Final = np.array([0x0F, 0x0F, 0x07], dtype=np.uint8)  # of a nibble
_FOUR: Final = 4  # bytes' uppermost bits of both nibbles go into one byte


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
    levels = torch.from_numpy(LEVELS.take(ranking.thirds)).unsqueeze(1)
    codes = (x - minimum).mul_(reciprocals(scale)).round_().clamp_(min=0)
    codes = torch.minimum(codes, levels, out=codes).to(torch.uint8).numpy()
    _pack(codes, ranking, packed.numpy())


def decode(layout: KVLayout, encoded: memoryview, target: Tensor, name: str) -> None:
    """Fill keys [layer, token, kv_head, head_dim] of the layout's dtype. Raises CorruptBlock."""
    torch = the_torch()
    bounds, stored_a, stored_b, packed = _split(encoded, layout)
    base, step, unit = load_short(bounds, name, signed=True).chunk(3, dim=-1)
    ranking = _ranking(stored_b)
    minimum, scale = _grids(stored_a, stored_b, (base, step.abs(), unit.abs()), ranking)
    values = torch.empty(target.shape)
    codes = torch.from_numpy(_unpacked(packed.numpy(), ranking))
    values.view(layout.layers, 2, *codes.shape[2:]).copy_(codes.transpose(0, 1))
    if target.dtype is torch.float32:
        torch.addcmul(minimum, values, scale, out=target)  # a pass less
    else:
        settle(torch.addcmul(minimum, values, scale, out=values), target)


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Channels by range, the greatest first, of equal ones the lesser channel."""

    thirds: NDArray[np.intp]  # [layer, kv_head, head_dim]: 0 where it borrows, 1 where not, 2 where it lends
    borrowers: NDArray[np.intp]  # [layer, pair]: which of all heads' channels; beside it, in `lenders`,
    lenders: NDArray[np.intp]  # the one that has its fifth bit


def _ranking(b: Tensor) -> _Ranking:
    layers, heads, d = b.shape
    lent = d * LENT[0] // LENT[1]
    # Keys that are all different: numpy sorts 90 heads of 64 in 10 us, torch's stable sort takes 100.
    below = (d - 1).bit_length()
    last = (1 << below) - 1  # a power of two: masks, where divisions cost more than the sort
    key = (b.numpy().astype(np.int32) << below) + np.arange(last, last - d, -1, dtype=np.int32)
    ordered: NDArray[np.int32] = np.sort(key, axis=-1)
    lenders = last - (ordered[..., :lent] & last)
    borrowers = last - (ordered[..., : -lent - 1 : -1] & last)
    heads_at = d * np.arange(heads)[:, None]
    lends = key <= ordered[..., lent - 1, None]
    return _Ranking(
        np.add(key < ordered[..., -lent, None], lends, dtype=np.intp),
        (borrowers + heads_at).reshape(layers, -1),
        (lenders + heads_at).reshape(layers, -1),
    )


def _grids(
    a: Tensor, b: Tensor, bounds: tuple[Tensor, Tensor, Tensor], ranking: _Ranking
) -> tuple[Tensor, Tensor]:
    """Each channel's minimum and scale: float32 [layer, 1, kv_head, head_dim]. By numpy, whose small
    operations cost a third of torch's."""
    base, step, unit = (bound.numpy() for bound in bounds)
    scale = b.numpy() * unit
    scale[scale < ENCODABLE_MIN] = 0
    scale *= SHARES.take(ranking.thirds)
    minimum = a.numpy() * step
    minimum += base
    from_numpy = the_torch().from_numpy
    return from_numpy(minimum[:, None]), short_above(from_numpy(scale[:, None]))


def _pack(codes: Bytes, ranking: _Ranking, packed: Bytes) -> None:
    """Two tokens' codes into each byte; the borrowers' fifth bits into the lenders' fourth."""
    layers, half, heads, d = packed.shape
    low, high = np.split(words(codes.reshape(layers, 2 * half, heads * d), d), 2, axis=1)
    tops = field(low, -1, 0x08) | field(high, 3, 0x80)
    lent = _moved(_gathered(tops), ranking.borrowers, ranking.lenders)
    nibbles = field(low, 0, 0x0F) | field(high, 4, 0xF0) | field(_spread(lent)[:, :half], 0, 0x88)
    packed[:] = nibbles.view(np.uint8).reshape(packed.shape)


def _unpacked(packed: Bytes, ranking: _Ranking) -> Bytes:
    """Codes: [half of the tokens, layer, token of the half, channel of all heads]."""
    layers, half, heads, d = packed.shape
    nibbles = words(packed.reshape(layers, half, heads * d).copy(), d)  # in memory of its own it is aligned
    fifths = _moved(_gathered(field(nibbles, 0, 0x88)), ranking.lenders, ranking.borrowers)
    fifths = _spread(fifths)[:, :half]
    codes = fields(nibbles, 4)
    codes &= words(_OWN.take(ranking.thirds).reshape(layers, 1, heads * d), d)
    codes[0] |= field(fifths, 1, 0x10)
    codes[1] |= field(fifths, -3, 0x10)
    return codes.view(np.uint8)


def _gathered(tops: Words) -> Words:
    """Four tokens' uppermost bits of both nibbles (0x88) in a byte: from [layer, token / 2, channels] to
    [layer, token / 8, channels], so that as few bytes as can be are moved from channel to channel."""
    layers, half, width = tops.shape
    if half % _FOUR:
        tops = np.pad(tops, ((0, 0), (0, -half % _FOUR), (0, 0)))
    quarters = tops.reshape(layers, _FOUR, -1) >> _shifts(tops)
    gathered: Words = np.bitwise_or.reduce(quarters, axis=1)
    return gathered.reshape(layers, -1, width)


def _spread(gathered: Words) -> Words:
    """The way back: the bits are where they were, others beside them."""
    layers, _, width = gathered.shape
    return (gathered.reshape(layers, 1, -1) << _shifts(gathered)).reshape(layers, -1, width)


def _shifts(of: Words) -> Words:
    return np.arange(_FOUR, dtype=of.dtype)[:, None]


def _moved(gathered: Words, sources: NDArray[np.intp], to: NDArray[np.intp]) -> Words:
    """Bytes of some channels at the places of others, and zeros elsewhere."""
    data = gathered.view(np.uint8)
    layers, groups, width = data.shape
    rows = width * np.arange(layers * groups).reshape(layers, groups, 1)
    moved = np.zeros_like(data)
    moved.reshape(-1)[rows + to[:, None]] = data.reshape(-1).take(rows + sources[:, None])
    return words(moved, width)


def _split(encoded: memoryview, layout: KVLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounds int16 [layer, kv_head, 3], a and b uint8 [layer, kv_head, head_dim], codes uint8
    [layer, token / 2, kv_head, head_dim]: views."""
    data, layers, heads, d = bytes_of(encoded), layout.layers, layout.kv_heads, layout.head_dim
    rows = layers * heads
    ends = 6 * rows, (6 + d) * rows, (6 + 2 * d) * rows
    bounds, a, b, packed = data.tensor_split(ends)
    shape = (layers, heads, d)
    return (
        bounds.view(the_torch().int16).view(layers, heads, 3),
        a.view(shape),
        b.view(shape),
        packed.view(layers, -1, heads, d),
    )
