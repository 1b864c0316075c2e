"""The seam of codecs: a block's payload in fewer bytes, and back, by one formula for ever.

A codec turns the bytes of one block (`[layer][k,v][token][kv_head][head_dim]`) into `encoded_nbytes(layout)`
bytes and back into a block of the same layout that is close to it. Its number stands in the frame's header
and its digest beside it, so a reader knows what it has before it decodes. What a codec is (name, number,
quality, sizes, digest) costs nothing to ask and needs no torch; encoding and decoding do (they run where
torch runs, in any thread: a codec has no state).

How it fails: `check` raises ConfigError for a layout the codec cannot do, at configuration time. `encode`
answers None for KV it cannot stand for (NaN, infinities, values beyond `ENCODABLE_MAX`): keep such a block
lossless. `decode` raises CorruptBlock for bytes that no encoder made, and never anything else.

*Exactness.* Codes are the same bits from torch on a CPU and from Triton on CUDA. Every formula is float32
additions, multiplications, one correctly rounded reciprocal a scale, and rounding half to even, in a stated
order. Scales have 8 significant bits, so code times scale is exact and nothing depends on whether a
compiler fuses it with an addition (`exact.py`).
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final

from kvstore.errors import ConfigError, CorruptBlock
from kvstore.nouns import DTYPE_NBYTES, KVLayout, MissReason, Quality

CODEC_DIGEST_NBYTES: Final = 16
ENCODABLE_MAX: Final = 2.0**100
"""Greatest magnitude that is encoded: far from where a step on the way overflows."""
ENCODABLE_MIN: Final = 2.0**-100
"""Ranges below it are taken for zero: far from where processors differ about subnormal numbers."""

_DIGEST_TAG: Final = b"kvstrata.codec.1\0"


@dataclass(frozen=True, slots=True)
class Codec(ABC):
    """One format. Subclasses are frozen dataclasses whose fields are the format's parameters."""

    name: ClassVar[str]
    number: ClassVar[int]  # in frame headers: stable for ever; 0 is lossless
    quality: ClassVar[Quality]  # the best a block that went through it may claim, by measured loss
    revision: ClassVar[int] = 1  # of the formulas: another one is another digest

    def check(self, layout: KVLayout) -> None:
        """Raises ConfigError for a layout that this codec cannot do, or makes no smaller."""
        why = self.unfit(layout)
        if why is None and self.number and self.encoded_nbytes(layout) >= layout.block_nbytes:
            why = "its blocks are too small to become smaller"
        if why is not None:
            raise ConfigError(f"codec {self.name} cannot encode {layout}: {why}. Choose another codec")

    def fits(self, layout: KVLayout) -> bool:
        """Whether `check` passes."""
        return self.unfit(layout) is None and self.encoded_nbytes(layout) < layout.block_nbytes

    def unfit(self, layout: KVLayout) -> str | None:
        """Why the layout's shape is none this codec can do; None: it can."""
        return None

    def digest(self, layout: KVLayout) -> bytes:
        """16 bytes over all that decides what encoded bytes mean: format, parameters, layout."""
        return _digest(self, layout)

    @abstractmethod
    def encoded_nbytes(self, layout: KVLayout) -> int:
        """Bytes of every encoded block of the layout, scales, minima and padding included."""

    @abstractmethod
    def encode(self, layout: KVLayout, payload: memoryview) -> memoryview | None:
        """The encoded block in memory of its own, or None: this KV is to be kept as it is.

        Raises ValueError for a payload of another size than the layout's.
        """

    @abstractmethod
    def decode(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        """Fill `out` (writable, `block_nbytes`) with the decoded block. Raises CorruptBlock: `out` is
        undefined then."""

    def bits_per_element(self, layout: KVLayout) -> float:
        """Of an encoded block, everything counted."""
        return self.encoded_nbytes(layout) * 8 / elements(layout)

    def check_sizes(self, layout: KVLayout, encoded: memoryview, out: memoryview) -> None:
        """What every decoder asks first."""
        if encoded.nbytes != self.encoded_nbytes(layout):
            wanted = self.encoded_nbytes(layout)
            raise CorruptBlock(MissReason.BAD_HEADER, f"{self.name}: {encoded.nbytes} bytes of {wanted}")
        if out.nbytes != layout.block_nbytes:
            raise ValueError(f"room of {out.nbytes} bytes for a block of {layout.block_nbytes}")


def elements(layout: KVLayout) -> int:
    """Numbers in a block, K and V of all layers, tokens and heads."""
    return layout.block_nbytes // DTYPE_NBYTES[layout.dtype]


@functools.lru_cache(maxsize=256)
def _digest(codec: Codec, layout: KVLayout) -> bytes:
    said = f"{codec.name}\0{codec.number}\0{codec.revision}\0{codec!r}\0".encode()
    return hashlib.sha256(_DIGEST_TAG + said + layout.canonical()).digest()[:CODEC_DIGEST_NBYTES]
