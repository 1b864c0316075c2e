"""Rotary position embedding: the inverse frequencies, one per pair of a head's dimensions.

    frequency_i = theta ** (-2 i / head_dim),  i = 0 .. head_dim / 2 - 1      (RoFormer, arXiv:2104.09864)

Long-context models stretch them. `linear` divides all by `factor`. `llama3` leaves wavelengths that fit
many times into the original context, divides those longer than it, and blends between:

    wavelength = 2 pi / frequency
    kept            wavelength < original / high_freq_factor
    divided         wavelength > original / low_freq_factor
    blended         smooth * kept + (1 - smooth) * divided,
                    smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)

`yarn` (arXiv:2309.00071) blends by the pair's number instead: pairs that turn more than beta_fast times
within the original context are kept, those that turn less than beta_slow times are divided, a straight ramp
between them. It also scales cosine and sine, so that scores are attention_factor ** 2 times larger:

    attention_factor = 0.1 ln(factor) + 1,   or the ratio of that with mscale and with mscale_all_dim
                                             in place of 1, or as the config says

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

__all__ = ["SUPPORTED_ROPE_TYPES", "attention_factor", "check_rope_scaling", "inverse_frequencies"]

_ORIGINAL: Final = "original_max_position_embeddings"
_FACTORS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor"),
}
SUPPORTED_ROPE_TYPES: Final = tuple(_FACTORS)
_KNOWN: Final = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"} | {
    *("truncate", "finetuned"),
    *(name for names in _FACTORS.values() for name in names),
}
"""Settings of any kind; one that is not used by the kind at hand means nothing."""


def check_rope_scaling(rope: Mapping[str, Any], context: int, where: str) -> dict[str, Any] | None:
    """The settings `inverse_frequencies` needs, in a canonical form; None for plain rope.

    Raises ModelUnsupported for a kind it does not know, ModelCorrupt for missing or senseless factors.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = {key for key, value in rope.items() if key not in _KNOWN and value is not None}
    if kind not in _FACTORS or unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelUnsupported(
            f"{where}: rope scaling {kind!r} with {dict(rope)} is not supported",
            f"Use a model with rope scaling of one of: {', '.join(SUPPORTED_ROPE_TYPES)}",
        )
    if kind == "default":
        return None
    given = {_ORIGINAL: context, **{name: value for name, value in rope.items() if value is not None}}
    if kind == "yarn":
        given = _yarn_defaults(given, context, where)
    settings: dict[str, Any] = {"rope_type": kind}
    for name in _FACTORS[kind]:
        settings[name] = _positive(given, name, where)
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise ModelCorrupt(f"{where}: rope low_freq_factor is not below high_freq_factor", "Fetch it again")
    if kind == "yarn":
        settings["truncate"] = bool(given.get("truncate", True))
    return settings


def _positive(rope: Mapping[str, Any], name: str, where: str) -> float:
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelCorrupt(
            f"{where}: its rope scaling needs a positive {name}, got {value!r}", "Fetch it again"
        )
    return float(value)


def _yarn_defaults(rope: Mapping[str, Any], context: int, where: str) -> dict[str, Any]:
    """`rope` with what yarn computes from the rest where the config is silent, as transformers does (an
    explicit 0 for a beta or an mscale is silence, too)."""
    filled = {"factor": context / _positive(rope, _ORIGINAL, where), **rope}
    filled["beta_fast"] = rope.get("beta_fast") or 32
    filled["beta_slow"] = rope.get("beta_slow") or 1
    if "attention_factor" not in rope:
        factor = _positive(filled, "factor", where)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            scales = [_positive(rope, name, where) for name in ("mscale", "mscale_all_dim")]
            over, under = (_magnitude(factor, scale) for scale in scales)
            filled["attention_factor"] = over / under
        else:
            filled["attention_factor"] = _magnitude(factor, 1)
    return filled


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def attention_factor(config: ModelConfig) -> float:
    """What cosine and sine are multiplied with."""
    return float((config.rope_scaling or {}).get("attention_factor", 1.0))


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [head_dim / 2] on the CPU. Angle of pair i at position p is p * result[i]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = torch.reciprocal(torch.pow(config.rope_theta, exponents))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return torch.div(frequencies, float(scaling["factor"]))
    if scaling["rope_type"] == "yarn":
        return _yarn(config, exponents, scaling)
    return _llama3(frequencies, **{name: scaling[name] for name in _FACTORS["llama3"]})


def _yarn(config: ModelConfig, exponents: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    size = config.head_dim

    def pair_that_turns(times: float) -> float:
        """Number (a fraction) of the pair that turns so many times within the original context."""
        return (size * math.log(scaling[_ORIGINAL] / (times * 2 * math.pi))) / (
            2 * math.log(config.rope_theta)
        )

    first, last = pair_that_turns(scaling["beta_fast"]), pair_that_turns(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last += 0.001 * (first == last)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    wavelengths = torch.pow(config.rope_theta, exponents)
    kept = 1 - ramp
    divided = torch.reciprocal(scaling["factor"] * wavelengths)
    return divided * (1 - kept) + torch.reciprocal(wavelengths) * kept


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
