"""A model that loads is a model that is computed right: the rest is refused, by name, with a cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from engine.errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from engine.models.config import ModelConfig
from engine.models.families import FAMILIES, Family
from tests.tiny_model import make_tiny_model, tiny_config

QWEN2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": None}


def write_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_reads_the_tiny_model(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(make_tiny_model(tmp_path))
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps) == (10000.0, None, 1e-5)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)


def test_absent_keys_take_the_families_defaults() -> None:
    raw = tiny_config()
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "eos_token_id"):
        del raw[key]
    config = ModelConfig.from_dict(raw, "here")
    assert (config.head_dim, config.kv_heads, config.rope_theta) == (16, 4, 10000.0)
    assert config.eos_token_ids == ()


def test_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2, 0)


def test_rope_parameters_of_newer_files_are_the_same_config() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    older = tiny_config(rope_theta=500000.0, rope_scaling=scaling)
    newer = tiny_config(rope_parameters=scaling | {"rope_theta": 500000.0})
    del newer["rope_theta"], newer["rope_scaling"]
    assert ModelConfig.from_dict(older, "here") == ModelConfig.from_dict(newer, "here")


def test_default_rope_by_name_is_no_scaling() -> None:
    raw = tiny_config(rope_scaling={"type": "default"})
    assert ModelConfig.from_dict(raw, "here").rope_scaling is None


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
        ({"architectures": ["MixtralForCausalLM"]}, "MistralForCausalLM"),  # the cure lists what is supported
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 2}, "layer_types"),
        (QWEN2 | {"layer_types": ["full_attention"]}, "2 layers"),
        (
            QWEN2 | {"layer_types": ["full_attention", "chunked_attention"]},
            "full_attention, sliding_attention",
        ),
        ({"architectures": ["Qwen2ForCausalLM"]}, "attention_bias = False"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "llama3"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": "su"}, "su"),
    ],
)
def test_what_would_be_computed_wrong_is_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelUnsupported, match=named):
        ModelConfig.from_dict(tiny_config(**overrides), "here")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"head_dim": 15}, "15"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "low_freq_factor",
        ),
    ],
)
def test_senseless_values_are_named(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelCorrupt, match=named):
        ModelConfig.from_dict(tiny_config(**overrides), "here")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_absent_keys_mean_what_they_mean_to_transformers(family: Family) -> None:
    raw = {"architectures": [family.architecture], "vocab_size": 9, "hidden_size": 4096}
    raw |= {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 32}
    theirs = AutoConfig.for_model(family.name, **{k: v for k, v in raw.items() if k != "architectures"})
    ours = ModelConfig.from_dict(raw, "here")
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.windows == (getattr(theirs, "sliding_window", None),) * 3


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_below_a_default_number_see_everything(family: str) -> None:
    raw = tiny_config(model_type=family, architectures=None, attention_bias=None, num_hidden_layers=30)
    raw |= {"use_sliding_window": True, "sliding_window": 64}
    theirs = AutoConfig.for_model(family, num_hidden_layers=30, use_sliding_window=True, sliding_window=64)
    expected = tuple(64 if kind == "sliding_attention" else None for kind in theirs.layer_types)
    assert ModelConfig.from_dict(raw, "here").windows == expected
    assert set(expected) == {64, None}


def test_a_family_may_be_named_by_its_type_alone() -> None:
    raw = tiny_config(model_type="qwen3")
    del raw["architectures"]
    config = ModelConfig.from_dict(raw, "here")
    assert config.query_key_norm
    assert not config.biased


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        ModelConfig.from_folder(tmp_path / "nowhere")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": NaN'])
def test_a_config_that_is_not_an_object_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelCorrupt, match=r"config\.json"):
        ModelConfig.from_folder(write_config(tmp_path, text))
