"""What a model is: the fields of config.json that the runner needs, checked once, then trusted.

Reading costs a millisecond. Whatever the runner does not compute exactly (other activations, rope scalings
it does not know, quantised weights, other architectures) is refused here by name: a model that loads is a
model that is computed right. What sets the families apart is in families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from engine.errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from engine.folder import CONFIG_FILE, read_json_object
from engine.models.families import FAMILIES, Family, family_of
from engine.models.rope import check_rope_scaling
from kvstore.nouns import KVLayout

__all__ = ["ModelConfig"]

_SIZE_MAX: Final = 1 << 24  # no vocabulary, width, depth or context is near it: a bound against nonsense
_LAYER_TYPES: Final = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of one of the families. `rope_scaling` is None or one of rope.py's kinds, checked;
    `biased` names the projections of attention (of q, k, v, o) that have a bias; `windows` tells of each
    layer how many tokens a query sees (attention/base.py)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    biased: tuple[str, ...]
    query_key_norm: bool
    windows: tuple[int | None, ...]

    def kv_layout(self, dtype: str, block_tokens: int) -> KVLayout:
        """Of blocks with all of its heads."""
        return KVLayout(self.layers, 0, self.kv_heads, self.head_dim, dtype, block_tokens)

    @classmethod
    def from_folder(cls, path: Path) -> Self:
        """Read `path`/config.json. Raises ModelNotFound, ModelCorrupt or ModelUnsupported.

        End tokens come from generation_config.json if it names any (chat models list more there).
        """
        if not path.is_dir():
            raise ModelNotFound(
                f"there is no model folder {path}",
                "Give a folder with config.json and safetensors, a GGUF file, or a name that "
                "`kvstrata model list` shows",
            )
        raw = read_json_object(path / CONFIG_FILE)
        generation_file = path / "generation_config.json"
        if generation_file.exists():
            eos = read_json_object(generation_file).get("eos_token_id")
            raw = raw | ({} if eos is None else {"eos_token_id": eos})
        return cls.from_dict(raw, str(path / CONFIG_FILE))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> Self:
        """The same from a parsed config.json; `where` names it in errors."""
        family = _supported_family(raw, where)
        raw = {**family.defaults, **raw}
        read = _Reader(raw, where)
        hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
        kv_heads = read.size("num_key_value_heads", heads)
        head_dim = read.size("head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise ModelCorrupt(
                f"{where}: {heads} attention heads over {kv_heads} KV heads, width {head_dim}: uneven",
                "Fetch the model again",
            )
        rope = _rope(raw)
        theta = rope.get("rope_theta", 10000.0)
        context = read.size("max_position_embeddings", 2048)
        layers = read.size("num_hidden_layers")
        return cls(
            model_type=family.name,
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            rope_theta=read.positive("rope_theta", theta),
            rope_scaling=check_rope_scaling(rope, context, where),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=context,
            eos_token_ids=read.token_ids("eos_token_id"),
            bos_token_id=next(iter(read.token_ids("bos_token_id")), None),
            biased=family.biased_projections(raw),
            query_key_norm=family.query_key_norm,
            windows=_windows(read, layers),
        )


def _supported_family(raw: Mapping[str, Any], where: str) -> Family:
    family = family_of(raw)
    if family is None:
        name = raw.get("architectures") or raw.get("model_type")
        raise ModelUnsupported(
            f"{where}: the architecture {name!r} is not supported",
            f"Use a model of one of: {', '.join(known.architecture for known in FAMILIES)}",
        )
    found = family.unsupported(raw)
    if found is not None:
        key, value, wanted = found
        raise ModelUnsupported(
            f"{where}: {key} = {value!r} is not supported in a {family.name} model (only {wanted!r} is)",
            "Use a model without it, such as smollm2-135m",
        )
    return family


def _windows(read: _Reader, layers: int) -> tuple[int | None, ...]:
    """Of each layer. Layers below `max_window_layers` see everything, unless `layer_types` names each."""
    raw = read.raw
    window = None
    if raw["use_sliding_window"] and raw.get("sliding_window") is not None:
        window = read.size("sliding_window")
    kinds = raw.get("layer_types")
    if kinds is None:
        first = 0 if window is None else read.count("max_window_layers")
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_TYPES for kind in kinds):
        raise ModelUnsupported(
            f"{read.where}: layer_types is not one of {', '.join(_LAYER_TYPES)} for each of {layers} layers",
            "Use a model whose layers are of these kinds",
        )
    if window is None and _LAYER_TYPES[1] in kinds:
        raise ModelCorrupt(
            f"{read.where}: layer_types has sliding layers, but no sliding_window is in use", "Fetch it again"
        )
    return tuple(window if kind == _LAYER_TYPES[1] else None for kind in kinds)


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings in one flat dict, from either form: rope_theta beside rope_scaling, or (newer
    files) both within rope_parameters."""
    settings = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = dict(settings) if isinstance(settings, Mapping) else {"rope_type": settings}
    if raw.get("rope_theta") is not None:
        rope.setdefault("rope_theta", raw["rope_theta"])
    original = "original_max_position_embeddings"
    return rope if raw.get(original) is None else rope | {original: raw[original]}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed, bounded look-ups whose errors name the key."""

    raw: Mapping[str, Any]
    where: str

    def size(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _SIZE_MAX:
            raise self._wrong(key, value, f"a whole number from 1 to {_SIZE_MAX}")
        return value

    def count(self, key: str) -> int:
        value = self.raw[key]
        if type(value) is not int or not 0 <= value <= _SIZE_MAX:
            raise self._wrong(key, value, f"a whole number up to {_SIZE_MAX}")
        return value

    def positive(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or not 0 <= i <= _SIZE_MAX for i in ids):
            raise self._wrong(key, value, "a token id or a list of them")
        return tuple(ids)

    def _wrong(self, key: str, value: object, wanted: str) -> ModelCorrupt:
        return ModelCorrupt(f"{self.where}: {key} is {value!r}, not {wanted}", "Fetch the model again")
