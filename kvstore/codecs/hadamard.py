"""Rotation in blocks of 16 channels by the Hadamard matrix of Sylvester's order, exactly.

`(QH)(KH)^T = QK^T`: rotating head_dim spreads a channel's outlier over 16 channels, so that one scale fits
all (QuaRot, arXiv 2404.00456; block-diagonal in SAW-INT4, arXiv 2604.19157). Encoding rotates, decoding
rotates back: H is symmetric and H H = 16, so what encodes is H x and what decodes is H y / 16.

*Forward* are four stages of float32 additions in a fixed order. *Back* acts on codes, which are small
integers: sums are exact in any order, and the product of matrices that a BLAS computes is too. 16 channels,
not 64: the product of a block costs 0.2 ms where 64 costs 0.7 (one core), and no model's perplexity told
them apart (docs/devlog.md).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from kvstore.codecs.exact import the_torch

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
