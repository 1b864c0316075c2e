"""int4: a scale and a minimum for each token and head. The plain scheme, to compare with: it loses most.

    minimum = short_below(min x)              over head_dim
    scale   = short((max x - minimum) / 15)
    code    = clamp(round((x - minimum) * (1 / scale)), 0, 15)
    x'      = code * scale + minimum          the product exact in float32, one rounding after it

    encoded   scales  u16 [row]               upper halves of float32, row = [layer][k,v][token][kv_head]
              minima  i16 [row]
              codes   u8  [row][head_dim / 2] channel j in the low nibble, channel j + head_dim / 2 above it

4.5 bits an element at head_dim 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

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
    short_below,
    store_short,
    the_torch,
)
from kvstore.codecs.scaled import rows_of
from kvstore.nouns import KVLayout, Quality

if TYPE_CHECKING:
    from torch import Tensor

CODE_MAX: Final = 15


@dataclass(frozen=True, slots=True)
class Int4(Codec):
    name: ClassVar[str] = "int4"
    number: ClassVar[int] = 3
    quality: ClassVar[Quality] = Quality.INT4

    def unfit(self, layout: KVLayout) -> str | None:
        return "head_dim is odd" if layout.head_dim % 2 else None

    def encoded_nbytes(self, layout: KVLayout) -> int:
        return rows_of(layout) * 4 + elements(layout) // 2

    def encode(self, layout: KVLayout, payload: memoryview) -> memoryview | None:
        torch = the_torch()
        x = kv_of(payload, layout).view(-1, layout.head_dim).to(torch.float32)
        if not is_encodable(x.abs().amax()):
            return None
        x = self._forward(x)
        least, most = x.aminmax(dim=-1, keepdim=True)
        minimum = short_below(least)
        scale = scales((most - minimum).clamp_min_(0), CODE_MAX)
        encoded = new_bytes(self.encoded_nbytes(layout)).data
        stored_scale, stored_minimum, packed = _split(encoded, layout)
        store_short(scale, stored_scale)
        store_short(minimum, stored_minimum)
        codes = ((x - minimum) * reciprocals(scale)).round_().clamp_(0, CODE_MAX).to(torch.uint8)
        low, high = codes.chunk(2, dim=1)
        packed.copy_(low | (high << 4))
        return encoded

    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        self.check_sizes(layout, encoded, out)
        stored_scale, stored_minimum, packed = _split(encoded, layout)
        scale = load_short(stored_scale, self.name)
        minimum = load_short(stored_minimum, self.name, signed=True)
        target = kv_of(out, layout).view(-1, layout.head_dim)
        codes = self._room_of_codes(target)
        low, high = codes.chunk(2, dim=1)
        low.copy_(packed & CODE_MAX)
        high.copy_(packed >> 4)
        settle(self._back(codes, scale, minimum, target), target)

    def _forward(self, x: Tensor) -> Tensor:
        """What is quantised of float32 [row, head_dim]."""
        return x

    def _room_of_codes(self, target: Tensor) -> Tensor:
        """Float32 of the target's shape, for `_back`."""
        return float32_room(target)

    def _back(self, codes: Tensor, scale: Tensor, minimum: Tensor, target: Tensor) -> Tensor:
        """What is to be settled in the target, of codes in float32 [row, head_dim], which may be lost."""
        return codes.mul_(scale).add_(minimum)


def _split(encoded: memoryview, layout: KVLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minima int16 [row, 1], packed codes uint8 [row, head_dim / 2]: views."""
    n, data = rows_of(layout), bytes_of(encoded)
    shorts = data[: 4 * n].view(the_torch().int16)
    return shorts[:n].view(n, 1), shorts[n:].view(n, 1), data[4 * n :].view(n, -1)
