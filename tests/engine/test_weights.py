"""Weights fit their config or are refused by tensor name; the digest names all that decides KV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from engine.models.config import ModelConfig
from engine.weights import EMBEDDING, LM_HEAD, load_weights
from tests.engine.models.family_models import family_model, save_family_model
from tests.tiny_model import make_tiny_model, random_tensors, tiny_config

NORM = "model.norm.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def config_of(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(**overrides), "here")


def digest_of(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> bytes:
    return load_weights(folder, config_of(**overrides), dtype).digest


def test_tensors_are_those_that_were_stored(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, seed=3, tie_word_embeddings=True)
    weights = load_weights(tmp_path, config_of(tie_word_embeddings=True), torch.float32)
    stored = random_tensors(tiny_config(tie_word_embeddings=True), seed=3)
    assert weights.tensors.keys() == stored.keys() | {LM_HEAD}
    assert all(torch.equal(weights.tensors[name], stored[name]) for name in stored)
    assert weights.tensors[LM_HEAD] is weights.tensors[EMBEDDING]


def test_untied_head_is_loaded(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, tie_word_embeddings=False)
    weights = load_weights(tmp_path, config_of(tie_word_embeddings=False), torch.float32)
    assert not torch.equal(weights.tensors[LM_HEAD], weights.tensors[EMBEDDING])


def test_casts_to_the_compute_dtype(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    weights = load_weights(tmp_path, config_of(), torch.bfloat16)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.bfloat16}
    assert torch.equal(weights.tensors[NORM], random_tensors(tiny_config())[NORM].bfloat16())


def test_shards_are_the_same_weights_as_one_file(tmp_path: Path) -> None:
    whole, sharded = make_tiny_model(tmp_path / "whole"), tmp_path / "sharded"
    sharded.mkdir()
    tensors = random_tensors(tiny_config())
    names = sorted(tensors)
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, sharded / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert digest_of(sharded) == digest_of(whole)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {NORM: "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match=r"model-2\.safetensors"):
        digest_of(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, {NORM: "../outside"}, {NORM: 3}])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelCorrupt, match="weight_map"):
        digest_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 5_000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors"):
        digest_of(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save(tmp_path, tensors)
    with pytest.raises(ModelCorrupt, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        digest_of(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    with pytest.raises(ModelCorrupt, match=r"layers\.0\.mlp\.gate_proj\.weight.*\[128, 64\].*\[256, 64\]"):
        digest_of(tmp_path, intermediate_size=256)


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save(tmp_path, random_tensors(tiny_config()) | extra)
    with pytest.raises(ModelUnsupported, match=r"q_proj\.bias"):
        digest_of(tmp_path)


def test_tensors_without_information_change_nothing(tmp_path: Path) -> None:
    tied: Any = {"tie_word_embeddings": True}
    plain, chatty = (make_tiny_model(tmp_path / name, **tied) for name in ("plain", "chatty"))
    tensors = random_tensors(tiny_config(**tied))
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        LM_HEAD: tensors[EMBEDDING].clone(),
    }
    save(chatty, tensors | extra)
    assert digest_of(chatty, **tied) == digest_of(plain, **tied)


def test_an_integer_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path, random_tensors(tiny_config()) | {NORM: torch.ones(64, dtype=torch.int8)})
    with pytest.raises(ModelUnsupported, match="int8"):
        digest_of(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnsupported, match="pickle"):
        digest_of(tmp_path)


def test_no_weights_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        digest_of(tmp_path)


def test_the_digest_is_pinned(tmp_path: Path) -> None:
    """It binds stored KV to weights: a change of how it is made empties every cache, so is made knowingly."""
    tensors = random_tensors(tiny_config(tie_word_embeddings=True))
    save(tmp_path, {name: torch.full_like(tensor, 0.5) for name, tensor in tensors.items()})
    assert digest_of(tmp_path, tie_word_embeddings=True).hex() == "e39fb3ca90d8f3fb9e22986a76b0b3c8"


def test_the_digest_is_of_16_bytes_and_repeatable(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    assert len(digest_of(tmp_path)) == 16
    assert digest_of(tmp_path) == digest_of(tmp_path)


def test_one_changed_bit_changes_the_digest(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    before = digest_of(tmp_path)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest_of(tmp_path) != before


def test_swapped_tensors_of_one_shape_change_the_digest(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    before = digest_of(tmp_path)
    tensors = random_tensors(tiny_config())
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save(tmp_path, tensors)
    assert digest_of(tmp_path) != before


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_theta": 20000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-6},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        {"rope_scaling": YARN},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
    ],
)
def test_settings_that_change_kv_change_the_digest(tmp_path: Path, overrides: dict[str, Any]) -> None:
    make_tiny_model(tmp_path)
    assert digest_of(tmp_path, **overrides) != digest_of(tmp_path)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"sliding_window": 64}, {"sliding_window": 65}),
        ({"sliding_window": 64}, {"sliding_window": None}),
        ({"rope_scaling": YARN}, {"rope_scaling": YARN | {"attention_factor": 1.2}}),
        ({"rope_scaling": YARN}, {"rope_scaling": YARN | {"beta_fast": 16}}),
        ({"rope_scaling": YARN}, {"rope_scaling": YARN | {"truncate": False}}),
        ({"rope_scaling": YARN}, {"rope_scaling": YARN | {"original_max_position_embeddings": 256}}),
    ],
)
def test_models_of_equal_tensors_that_differ_in_kv_differ(
    tmp_path: Path, left: dict[str, Any], right: dict[str, Any]
) -> None:
    make_tiny_model(tmp_path)
    mistral: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert digest_of(tmp_path, **mistral | left) != digest_of(tmp_path, **mistral | right)


@pytest.mark.parametrize(
    "left_window", [{"max_window_layers": 0}, {"layer_types": ["sliding_attention", "full_attention"]}]
)
def test_which_layers_are_windowed_is_in_the_digest(tmp_path: Path, left_window: dict[str, Any]) -> None:
    folder = save_family_model(family_model("qwen3-tied"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    config |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    digests = [
        load_weights(folder, ModelConfig.from_dict(config | its, "here"), torch.float32).digest
        for its in ({}, left_window)
    ]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("llama-biases", "model.layers.0.self_attn.o_proj.bias"),
    ],
)
def test_biases_and_norms_of_heads_are_in_the_digest_and_needed(
    tmp_path: Path, case: str, tensor: str
) -> None:
    folder = save_family_model(family_model(case), tmp_path)
    config = ModelConfig.from_folder(folder)
    before = load_weights(folder, config, torch.float32)
    changed = {name: value.clone() for name, value in before.tensors.items()}
    changed[tensor][3] += 0.5
    save(folder, changed)
    assert load_weights(folder, config, torch.float32).digest != before.digest
    del changed[tensor]
    save(folder, changed)
    with pytest.raises(ModelCorrupt, match=tensor):
        load_weights(folder, config, torch.float32)


def test_the_compute_dtype_changes_the_digest(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    assert digest_of(tmp_path, torch.bfloat16) != digest_of(tmp_path)
