"""The families, told by what sets them apart from Llama: one frozen record each, found by architecture.

All of them are one decoder (llama.py): grouped-query attention with rotary positions, RMS norms before both
halves of a layer, a gated MLP. They differ in what a config's absent keys mean and in three switches: which
projections of attention have a bias; whether each head's query and key are normed before the rotation
(Qwen3); which layers see a window only (Mistral: all; Qwen: those behind `max_window_layers`, or as
`layer_types` says, if `use_sliding_window`). So a family is a record here, not a file of code: four files
would be the same one, to be kept equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["FAMILIES", "Family", "family_of"]

_PLAIN: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}
_SWITCHED: Final[Mapping[str, tuple[Any, ...]]] = {
    "use_sliding_window": (False, None),
    "layer_types": (None,),
}
_INPUTS: Final = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Family:
    """`defaults` are transformers' for keys that config.json leaves out. `must_be`: keys that, if present
    with any other value, change the computation in a way the runner does not do."""

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    biased: tuple[str, ...] = ()
    """Projections that always have a bias; with `attention_bias` in the config it is all four."""
    query_key_norm: bool = False

    def unsupported(self, raw: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """A key whose value is not computed, that value, and what it would have to be."""
        for key, allowed in {**_PLAIN, **self.must_be}.items():
            if key in raw and raw[key] not in allowed:
                return key, raw[key], allowed[0]
        return None

    def biased_projections(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        return (*_INPUTS, "o") if raw.get("attention_bias") and not self.biased else self.biased


_QWEN: Final[Mapping[str, Any]] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Final = (
    Family(
        name="llama",  # SmolLM and SmolLM2 too
        architecture="LlamaForCausalLM",
        defaults={"use_sliding_window": False},
        must_be={**_SWITCHED, "attention_bias": (False, True, None)},
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "use_sliding_window": True,
            "sliding_window": 4096,
            "max_window_layers": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        must_be={
            "use_sliding_window": (True,),
            "max_window_layers": (0,),
            "layer_types": (None,),
            "attention_bias": (False, None),
        },
    ),
    Family(
        name="qwen2",  # Qwen2.5 too
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        must_be={"attention_bias": (True, None)},
        biased=_INPUTS,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN, "head_dim": 128},
        must_be={"attention_bias": (False, True, None)},
        query_key_norm=True,
    ),
)


def family_of(raw: Mapping[str, Any]) -> Family | None:
    """By `architectures`, or by `model_type` where that is missing. None if it is none of ours."""
    names = raw.get("architectures")
    if isinstance(names, list) and names:
        return next((family for family in FAMILIES if family.architecture == names[0]), None)
    return next((family for family in FAMILIES if family.name == raw.get("model_type")), None)
