"""k4v4: keys by channel at 4.52 bits, values rotated at 4.25: 4.39 bits an element (32 tokens, head_dim 64).

The split is KIVI's (arXiv 2402.02750): a key's outliers sit in channels, so keys are quantised over tokens;
a value's do not, so values are quantised over channels. How, say channel_keys.py and rotated_values.py.

    encoded   keys of all layers, then values of all layers, each as its file draws it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codecs import channel_keys, rotated_values
from kvstore.codecs.base import Codec
from kvstore.codecs.exact import is_encodable, kv_of, new_bytes, the_torch
from kvstore.codecs.rotated_values import FOUR_BITS, Levels
from kvstore.nouns import KVLayout, Quality


@dataclass(frozen=True, slots=True)
class K4V4(Codec):
    name: ClassVar[str] = "k4v4"
    number: ClassVar[int] = 5
    quality: ClassVar[Quality] = Quality.K4V4
    levels: Levels = FOUR_BITS

    def unfit(self, layout: KVLayout) -> str | None:
        return channel_keys.unfit(layout) or rotated_values.unfit(layout)

    def encoded_nbytes(self, layout: KVLayout) -> int:
        return channel_keys.nbytes(layout) + rotated_values.nbytes(layout, self.levels)

    def encode(self, layout: KVLayout, payload: memoryview) -> memoryview | None:
        kv = kv_of(payload, layout).to(the_torch().float32)
        if not is_encodable(kv.abs().amax()):
            return None
        encoded = new_bytes(self.encoded_nbytes(layout)).data
        border = channel_keys.nbytes(layout)
        channel_keys.encode(kv[:, 0], layout, encoded[:border])
        values = kv[:, 1].reshape(-1, layout.head_dim)
        rotated_values.encode(values, layout, self.levels, encoded[border:])
        return encoded

    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        self.check_sizes(layout, encoded, out)
        target, border = kv_of(out, layout), channel_keys.nbytes(layout)
        channel_keys.decode(layout, encoded[:border], target[:, 0], self.name)
        rotated_values.decode(layout, self.levels, encoded[border:], target[:, 1], self.name)
