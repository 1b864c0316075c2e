"""What a codec makes of a block, as the codec itself says, and what it costs, as it was measured.

Sizes are those of Llama-3-70B's KV in bfloat16: 80 layers, 8 heads of 128 channels, 320 KiB a token.
Perplexity is SmolLM2-135M's with all its KV decoded codes, against none (docs/benchmarks.md, "Codecs").
"""

from __future__ import annotations

from typing import Final

from kvstore.codecs import CODECS, Codec
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout

LAYOUT: Final = KVLayout(80, 0, 8, 128, "bfloat16")
PERPLEXITY_INCREASE: Final[dict[str, float]] = {
    "lossless": 0.0,
    "int8": 0.18,
    "fp8": 0.78,
    "k4v4": 1.61,
    "k4v3": 3.69,
    "int4-hadamard": 8.54,
    "int4": 17.38,
}
"""In percent."""


def codec_named(name: str) -> Codec:
    """Raises ConfigError."""
    codec = CODECS.get(name)
    if codec is None:
        raise ConfigError(f"codec {name!r} is unknown: use one of {sorted(CODECS)}")
    return codec


def encoded_nbytes(codec: Codec, nbytes: int) -> int:
    """What the codec makes of so many bytes of lossless KV."""
    return max(1, round(nbytes * codec.encoded_nbytes(LAYOUT) / LAYOUT.block_nbytes))
