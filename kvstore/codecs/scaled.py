"""What int8 and fp8 share: rows of one token and head, a scale a row, a byte an element.

    scale = short(amax / value_max)           amax over head_dim; value_max is the greatest a code stands for
    code  = of x * (1 / scale)                the format's own
    x'    = value(code) * scale               exact in float32, rounded once to the layout's dtype

    encoded   scales  u16 [row]               upper halves of float32, row = [layer][k,v][token][kv_head]
              codes   u8  [row][head_dim]

8.25 bits an element at head_dim 64.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvstore.codecs.base import Codec, elements
from kvstore.codecs.exact import (
    bytes_of,
    float32_room,
    is_encodable,
    kv_of,
    load_short,
    new_bytes,
    reciprocals,
    scales,
    settle,
    store_short,
    the_torch,
)
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ScaledBytes(Codec):
    """A format of one byte an element: subclasses say what a byte means."""

    value_max: ClassVar[int]

    def encoded_nbytes(self, layout: KVLayout) -> int:
        return rows_of(layout) * 2 + elements(layout)

    def encode(self, layout: KVLayout, payload: memoryview) -> memoryview | None:
        x = kv_of(payload, layout).view(-1, layout.head_dim).to(the_torch().float32)
        amax = x.abs().amax(-1, keepdim=True)
        if not is_encodable(amax):
            return None
        encoded = new_bytes(self.encoded_nbytes(layout)).data
        stored, codes = _split(encoded, layout)
        scale = scales(amax, self.value_max)
        store_short(scale, stored)
        self._put_codes(x * reciprocals(scale), codes)
        return encoded

    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        self.check_sizes(layout, encoded, out)
        stored, codes = _split(encoded, layout)
        scale = load_short(stored, self.name)
        target = kv_of(out, layout).view(-1, layout.head_dim)
        values = float32_room(target)
        self._put_values(codes, scale, values)
        settle(values, target)

    @abstractmethod
    def _put_codes(self, scaled: Tensor, codes: Tensor) -> None:
        """Fill codes uint8 [row, head_dim] from float32 of that shape, which may be lost."""

    @abstractmethod
    def _put_values(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        """Fill float32 [row, head_dim] from codes and scales [row, 1]. Raises CorruptBlock."""


def rows_of(layout: KVLayout) -> int:
    """Vectors of head_dim in a block."""
    return elements(layout) // layout.head_dim


def _split(encoded: memoryview, layout: KVLayout) -> tuple[Tensor, Tensor]:
    """Stored scales int16 [row, 1] and codes uint8 [row, head_dim], views."""
    n = rows_of(layout)
    data = bytes_of(encoded)
    return data[: 2 * n].view(the_torch().int16).view(n, 1), data[2 * n :].view(n, layout.head_dim)
