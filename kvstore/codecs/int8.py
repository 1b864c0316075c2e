"""int8: one symmetric scale for each token and head, encoded as scaled.py draws it.

    scale = short(amax / 127)
    code  = clamp(round(x * (1 / scale)), -127, 127), i8
    x'    = code * scale

The scheme of vLLM's and SGLang's per-token-head int8 caches; that the scale is rounded up to 8 significant
bits costs at most 0.8 % of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvstore.codecs.exact import the_torch
from kvstore.codecs.scaled import ScaledBytes
from kvstore.nouns import Quality

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Int8(ScaledBytes):
    name: ClassVar[str] = "int8"
    number: ClassVar[int] = 1
    quality: ClassVar[Quality] = Quality.INT8
    value_max: ClassVar[int] = 127

    def _put_codes(self, scaled: Tensor, codes: Tensor) -> None:
        codes.view(the_torch().int8).copy_(scaled.round_().clamp_(-self.value_max, self.value_max))

    def _put_values(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        values.copy_(codes.view(the_torch().int8)).mul_(scale)
