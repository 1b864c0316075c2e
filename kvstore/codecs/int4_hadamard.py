"""int4-hadamard: int4 of what a Hadamard matrix of 16 channels makes of each token and head.

    y      = H x                              hadamard.py, in a stated order, unnormalised
    code   as in int4.py, of y
    x'     = (H code) * (scale / 16), and minimum more in the first channel of each 16

H of a constant is 16 times it in the first channel and 0 in the others: hence the minimum comes back there
alone. `H code` is an integer of at most 8 bits, so the product is exact. Encoded as int4.py draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvstore.codecs import hadamard
from kvstore.codecs.exact import float32_room, the_torch
from kvstore.codecs.int4 import Int4
from kvstore.nouns import KVLayout, Quality

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Int4Hadamard(Int4):
    name: ClassVar[str] = "int4-hadamard"
    number: ClassVar[int] = 4
    quality: ClassVar[Quality] = Quality.INT4_HADAMARD

    def unfit(self, layout: KVLayout) -> str | None:
        return f"head_dim is no multiple of {hadamard.SIZE}" if layout.head_dim % hadamard.SIZE else None

    def _forward(self, x: Tensor) -> Tensor:
        return hadamard.rotated(x)

    def _room_of_codes(self, target: Tensor) -> Tensor:
        room: Tensor = the_torch().empty(target.shape)
        return room

    def _back(self, codes: Tensor, scale: Tensor, minimum: Tensor, target: Tensor) -> Tensor:
        values = float32_room(target)
        hadamard.rotated_codes(codes, values)
        values.mul_(scale * (1 / hadamard.SIZE))
        values[:, :: hadamard.SIZE].add_(minimum)
        return values
