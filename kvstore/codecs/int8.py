"""int8: one symmetric scale for each token and head.

    scale = short(amax / 127)                 amax over head_dim
    code  = clamp(round(x * (1 / scale)), -127, 127)
    x'    = code * scale                      exact in float32, rounded once to the layout's dtype

    encoded   scales  u16 [row]               upper halves of float32, row = [layer][k,v][token][kv_head]
              codes   i8  [row][head_dim]

8.25 bits an element at head_dim 64. The scheme of vLLM's and SGLang's per-token-head int8 caches; that the
scale is rounded up to 8 significant bits costs at most 0.8 % of a step.
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
from kvstore.nouns import KVLayout, Quality

CODE_MAX: Final = 127


@dataclass(frozen=True, slots=True)
class Int8(Codec):
    name: ClassVar[str] = "int8"
    number: ClassVar[int] = 1
    quality: ClassVar[Quality] = Quality.INT8

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
        scale = scales(amax, CODE_MAX)
        store_short(scale, stored)
        codes.view(torch.int8).copy_((x * reciprocals(scale)).round_().clamp_(-CODE_MAX, CODE_MAX))
        return encoded

    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        self.check_sizes(layout, encoded, out)
        torch = the_torch()
        stored, codes = split(encoded, layout)
        scale = load_short(stored, self.name)
        target = kv_of(out, layout).view(-1, layout.head_dim)
        values = float32_room(target)
        values.copy_(codes.view(torch.int8)).mul_(scale)
        settle(values, target)
