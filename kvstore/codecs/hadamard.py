"""Rotation in blocks of 16 channels by the Hadamard matrix of Sylvester's order, exactly.

`(QH)(KH)^T = QK^T`: rotating head_dim spreads a channel's outlier over 16 channels, so that one scale fits
all (QuaRot, arXiv 2404.00456; block-diagonal in SAW-INT4, arXiv 2604.19157). Encoding rotates, decoding
rotates back: H is symmetric and H H = 16, so what encodes is H x and what decodes is H y / 16.

*Forward* are four stages of float32 additions in a fixed order. *Back* acts on codes, which are small
integers: sums are exact in any order, so a BLAS or a table may do them. 16 channels, not 64: the product of
a block costs 0.2 ms where 64 costs 0.7 (one core), and no model's perplexity told them apart
(docs/devlog.md).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.codecs.exact import the_torch
from kvstore.codecs.words import Bytes

if TYPE_CHECKING:
    from torch import Tensor

SIZE: Final = 16


def rotated(rows: Tensor) -> Tensor:
    """H x of float32 [row, head_dim], unnormalised: a new contiguous tensor, computed in the stated order."""
    torch = the_torch()
    channels = rows.reshape(-1, SIZE).t().contiguous()
    half = SIZE // 2
    while half:
        pairs = channels.view(SIZE // (2 * half), 2, half, -1)
        channels = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).view(SIZE, -1)
        half //= 2
    turned: Tensor = channels.t().reshape(rows.shape)
    return turned


def rotated_codes(codes: Tensor, out: Tensor) -> None:
    """H q into `out`, unnormalised and exact: both contiguous float32 [row, head_dim], q integers, |q| below
    2**19."""
    the_torch().mm(codes.view(-1, SIZE), _matrix(), out=out.view(-1, SIZE))


@functools.cache
def _matrix() -> Tensor:
    torch = the_torch()
    matrix = torch.ones(1, 1)
    while len(matrix) < SIZE:
        upper, lower = torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)
        matrix = torch.cat((upper, lower), 0)
    done: Tensor = matrix
    return done


def rotated_levels(codes: Bytes, levels: tuple[int, ...]) -> Tensor:
    """H level(code), unnormalised and exact: float32 of the shape of `codes`, contiguous uint8 below 16
    [..., channels]. Of the levels, one a code, no 16 may sum up to 2**24.

    Two channels' codes are one of 256 rows of a table: H level(code) is the sum of eight such rows.
    """
    torch = the_torch()
    halves = codes.reshape(-1, 2, SIZE // 2).view(np.uint64)
    pairs = (halves[:, 0] | (halves[:, 1] << 4)).view(np.uint8)  # j and j + 8 of 16
    table, firsts = _sums(levels)
    long = math.gcd(pairs.size, len(firsts))  # an addition over 8 numbers at a time costs three times as much
    index = torch.from_numpy(pairs).view(-1, long).to(torch.int32).add_(firsts[:long])
    turned: Tensor = torch.nn.functional.embedding_bag(index.view(-1, SIZE // 2), table, mode="sum")
    return turned.view(codes.shape)


@functools.cache
def _sums(levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What channels j and j + 8 of 16 add to H level(code): float32 [j and both codes in a byte, 16]; and
    where in it each j begins, int32, 128 times over."""
    torch = the_torch()
    level = torch.zeros(16)
    level[: len(levels)] = torch.tensor(levels, dtype=torch.float32)
    both, (lower, upper) = torch.arange(256), _matrix().unsqueeze(1).chunk(2)
    table = lower * level[both & 0x0F, None] + upper * level[both >> 4, None]
    return table.view(-1, SIZE), torch.arange(0, len(table) * 256, 256, dtype=torch.int32).repeat(128)
