"""What a codec makes of a block, and what it costs: in one place until replay asks the codecs themselves.

Bits an element, everything counted, at head_dim 64 and 32 tokens a block; perplexity of SmolLM2-135M with all
its KV decoded codes, against none (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvstore.errors import ConfigError

LOSSLESS_BITS: Final = 16.0


class Encoded(NamedTuple):
    bits: float  # an element
    perplexity_increase: float | None  # in percent


CODEC_BITS: Final[dict[str, Encoded]] = {
    "lossless": Encoded(LOSSLESS_BITS, 0.0),
    "int8": Encoded(8.25, 0.06),
    "fp8": Encoded(8.25, 0.97),
    "k4v4": Encoded(4.39, None),
    "k4v3": Encoded(3.89, None),
    "int4-hadamard": Encoded(4.5, 8.1),
    "int4": Encoded(4.5, 18.2),
}


def of(name: str) -> Encoded:
    """Raises ConfigError."""
    try:
        return CODEC_BITS[name]
    except KeyError:
        raise ConfigError(f"codec {name!r} is unknown: use one of {sorted(CODEC_BITS)}") from None
