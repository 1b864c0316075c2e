"""Lossless: the payload as it is. What every tier uses unless its configuration says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codecs.base import CODEC_DIGEST_NBYTES, Codec
from kvstore.frame import LOSSLESS_CODEC
from kvstore.nouns import KVLayout, Quality


@dataclass(frozen=True, slots=True)
class Lossless(Codec):
    name: ClassVar[str] = "lossless"
    number: ClassVar[int] = LOSSLESS_CODEC
    quality: ClassVar[Quality] = Quality.LOSSLESS

    def fits(self, layout: KVLayout) -> bool:
        return True

    def digest(self, layout: KVLayout) -> bytes:
        """Zeros: the frame of a block that no codec touched."""
        return bytes(CODEC_DIGEST_NBYTES)

    def encoded_nbytes(self, layout: KVLayout) -> int:
        return layout.block_nbytes

    def encode(self, layout: KVLayout, payload: memoryview) -> memoryview:
        if payload.nbytes != layout.block_nbytes:
            raise ValueError(f"a payload of {payload.nbytes} bytes for a block of {layout.block_nbytes}")
        return memoryview(bytearray(payload))

    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        self.check_sizes(layout, encoded, out)
        out.cast("B")[:] = encoded.cast("B")
