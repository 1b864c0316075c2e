"""Rotary position embedding: the inverse frequencies, one per pair of a head's dimensions.

    frequency_i = theta ** (-2 i / head_dim),  i = 0 .. head_dim / 2 - 1      (RoFormer, arXiv:2104.09864)

Long-context models stretch them. `linear` divides all by `factor`. `llama3` leaves wavelengths that fit
many times into the original context, divides those longer than it, and blends between:

    wavelength = 2 pi / frequency
    kept            wavelength < original / high_freq_factor
    divided         wavelength > original / low_freq_factor
    blended         smooth * kept + (1 - smooth) * divided,
                    smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)

Computed once a model, in float32 and in the order transformers computes them: equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from engine.errors import ModelCorrupt, ModelUnsupported

if TYPE_CHECKING:
    from engine.models.config import ModelConfig

__all__ = ["SUPPORTED_ROPE_TYPES", "check_rope_scaling", "inverse_frequencies"]

_FACTORS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SUPPORTED_ROPE_TYPES: Final = tuple(_FACTORS)


def check_rope_scaling(rope: Mapping[str, Any], context: int, where: str) -> dict[str, Any] | None:
    """The settings `inverse_frequencies` needs, in a canonical form; None for plain rope.

    Raises ModelUnsupported for a kind it does not know, ModelCorrupt for missing or senseless factors.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _FACTORS or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelUnsupported(
            f"{where}: rope scaling {kind!r} with {dict(rope)} is not supported",
            f"Use a model with rope scaling of one of: {', '.join(SUPPORTED_ROPE_TYPES)}",
        )
    if kind == "default":
        return None
    settings: dict[str, Any] = {"rope_type": kind}
    for name in _FACTORS[kind]:
        fallback = context if name == "original_max_position_embeddings" else None
        value = rope.get(name, fallback)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelCorrupt(
                f"{where}: rope scaling {kind!r} needs a positive {name}, got {value!r}", "Fetch it again"
            )
        settings[name] = float(value)
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise ModelCorrupt(f"{where}: rope low_freq_factor is not below high_freq_factor", "Fetch it again")
    return settings


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [head_dim / 2] on the CPU. Angle of pair i at position p is p * result[i]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = torch.reciprocal(torch.pow(config.rope_theta, exponents))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return torch.div(frequencies, float(scaling["factor"]))
    return _llama3(frequencies, **{name: scaling[name] for name in _FACTORS["llama3"]})


def _llama3(
    frequencies: torch.Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    divided = frequencies / factor
    span = high_freq_factor - low_freq_factor
    smooth = (original_max_position_embeddings / wavelengths - low_freq_factor) / span
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    kept = wavelengths < original_max_position_embeddings / high_freq_factor
    stretched = wavelengths > original_max_position_embeddings / low_freq_factor
    return torch.where(kept, frequencies, torch.where(stretched, divided, blended))
