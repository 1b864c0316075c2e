"""fp8: e4m3 numbers (OCP 8-bit floating point, no infinities), one scale for each token and head.

    scale = short(amax / 448)                 amax over head_dim; 448 is e4m3's greatest
    code  = e4m3(x * (1 / scale))             rounded half to even, subnormals included
    x'    = value(code) * scale               exact in float32, rounded once to the layout's dtype

    encoded   scales  u16 [row]               upper halves of float32, row = [layer][k,v][token][kv_head]
              codes   u8  [row][head_dim]     sign, 4 bits exponent (bias 7), 3 bits mantissa

8.25 bits an element at head_dim 64. An e4m3 number's bits, moved up by 7, are a float16's of 1/256 of its
value: so it is decoded, subnormals included, since torch's own conversion took 20 ns a number here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from kvstore.codecs.base import Codec, elements
from kvstore.codecs.exact import (
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
from kvstore.codecs.scaled import rows_of, split
from kvstore.errors import CorruptBlock
from kvstore.nouns import KVLayout, MissReason, Quality

VALUE_MAX: Final = 448
_NAN: Final = 0x7F  # the one magnitude that is no number
_NOT_BIT_14: Final = -0x4001
_HALF_OF_VALUE: Final = 256.0


@dataclass(frozen=True, slots=True)
class Fp8(Codec):
    name: ClassVar[str] = "fp8"
    number: ClassVar[int] = 2
    quality: ClassVar[Quality] = Quality.FP8

    def encoded_nbytes(self, layout: KVLayout) -> int:
        return rows_of(layout) * 2 + elements(layout)

    def encode(self, layout: KVLayout, payload: memoryview) -> memoryview | None:
        torch = the_torch()
        x = kv_of(payload, layout).view(-1, layout.head_dim).to(torch.float32)
        amax = x.abs().amax(-1, keepdim=True)
        if not is_encodable(amax):
            return None
        encoded = new_bytes(self.encoded_nbytes(layout)).data
        stored, codes = split(encoded, layout)
        scale = scales(amax, VALUE_MAX)
        store_short(scale, stored)
        scaled = (x * reciprocals(scale)).clamp_(-VALUE_MAX, VALUE_MAX)
        codes.copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8))
        return encoded

    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        self.check_sizes(layout, encoded, out)
        torch = the_torch()
        stored, codes = split(encoded, layout)
        scale = load_short(stored, self.name) * _HALF_OF_VALUE
        target = kv_of(out, layout).view(-1, layout.head_dim)
        if int((codes & _NAN).max()) == _NAN:
            raise CorruptBlock(MissReason.BAD_HEADER, f"{self.name}: a code that is no number")
        bits = codes.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(_NOT_BIT_14)
        values = float32_room(target)
        values.copy_(bits.view(torch.float16)).mul_(scale)
        settle(values, target)
