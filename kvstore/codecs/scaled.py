"""What int8 and fp8 share: rows of one token and head, a scale a row, a byte an element.

encoded   scales  u16 [row]                upper halves of float32
          codes   u8  [row][head_dim]      row = [layer][k,v][token][kv_head]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.codecs.base import elements
from kvstore.codecs.exact import bytes_of, the_torch
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from torch import Tensor


def rows_of(layout: KVLayout) -> int:
    """Vectors of head_dim in a block."""
    return elements(layout) // layout.head_dim


def split(encoded: memoryview, layout: KVLayout) -> tuple[Tensor, Tensor]:
    """Stored scales int16 [row, 1] and codes uint8 [row, head_dim], views."""
    n = rows_of(layout)
    data = bytes_of(encoded)
    return data[: 2 * n].view(the_torch().int16).view(n, 1), data[2 * n :].view(n, layout.head_dim)
