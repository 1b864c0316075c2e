"""Codecs by name and by number. One codec is one file that fills `base.Codec`.

    name            bits an element     what it is
    lossless        all of them         the payload itself
    int8            8.25                symmetric, a scale for each token and head
    fp8             8.25                e4m3, a scale for each token and head
    k4v4            4.39                keys by channel, values rotated
    k4v3            3.89                keys as in k4v4, values at three bits
    int4-hadamard   4.5                 rotated, a scale and a minimum for each token and head
    int4            4.5                 a scale and a minimum for each token and head, to compare with

Bits are at head_dim 64 and 32 tokens a block. `kvstrata bench codec` measures each on a real model.
"""

from __future__ import annotations

from typing import Final

from kvstore.codecs.base import Codec
from kvstore.codecs.fp8 import Fp8
from kvstore.codecs.int4 import Int4
from kvstore.codecs.int4_hadamard import Int4Hadamard
from kvstore.codecs.int8 import Int8
from kvstore.codecs.k4v3 import K4V3
from kvstore.codecs.k4v4 import K4V4
from kvstore.codecs.lossless import Lossless

__all__ = ["BY_NUMBER", "CODECS", "Codec"]

_ALL: Final[tuple[Codec, ...]] = (Lossless(), Int8(), Fp8(), Int4(), Int4Hadamard(), K4V4(), K4V3())
CODECS: Final[dict[str, Codec]] = {codec.name: codec for codec in _ALL}
BY_NUMBER: Final[dict[int, Codec]] = {codec.number: codec for codec in _ALL}
"""What a frame's header names. Numbers are on disks: never given anew."""
