"""fp8: e4m3 numbers (OCP 8-bit floating point, no infinities), one scale for each token and head, encoded as
scaled.py draws it.

    scale = short(amax / 448)                 448 is e4m3's greatest
    code  = e4m3(x * (1 / scale)), u8         rounded half to even, subnormals included:
                                              sign, 4 bits exponent (bias 7), 3 bits mantissa
    x'    = value(code) * scale

An e4m3 number's bits, moved up by 7, are a float16's of 1/256 of its value: so it is decoded, subnormals
included, since torch's own conversion took 20 ns a number here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from kvstore.codecs.exact import the_torch
from kvstore.codecs.scaled import ScaledBytes
from kvstore.errors import CorruptBlock
from kvstore.nouns import MissReason, Quality

if TYPE_CHECKING:
    from torch import Tensor

_NAN: Final = 0x7F  # the one magnitude that is no number
_NOT_BIT_14: Final = -0x4001
_HALF_OF_VALUE: Final = 256.0


@dataclass(frozen=True, slots=True)
class Fp8(ScaledBytes):
    name: ClassVar[str] = "fp8"
    number: ClassVar[int] = 2
    quality: ClassVar[Quality] = Quality.FP8
    value_max: ClassVar[int] = 448

    def _put_codes(self, scaled: Tensor, codes: Tensor) -> None:
        torch = the_torch()
        scaled.clamp_(-self.value_max, self.value_max)
        codes.copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8))

    def _put_values(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        torch = the_torch()
        if int((codes & _NAN).max()) == _NAN:
            raise CorruptBlock(MissReason.BAD_HEADER, f"{self.name}: a code that is no number")
        bits = codes.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(_NOT_BIT_14)
        values.copy_(bits.view(torch.float16)).mul_(scale * _HALF_OF_VALUE)
