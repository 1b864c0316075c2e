"""What cannot be shared is refused at start, with the reason and what to do; the rest gets its namespaces."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore.integrations.vllm.config import read_config
from kvstore.integrations.vllm.facts import read_facts, refuse, setup_of
from kvstore.integrations.vllm.setup import head_range
from kvstore.integrations.vllm.versions import check_version


class FullAttentionSpec(SimpleNamespace):
    pass


def engine(folder: Path | str = "/models/tiny", **changes: Any) -> tuple[Any, Any]:
    """vLLM's two configuration objects, as far as they are read."""
    spec = changes.get("spec") or FullAttentionSpec(
        block_size=16, num_kv_heads=4, head_size=64, head_size_v=64, dtype="torch.bfloat16", kv_quant_mode=0
    )
    layers = [f"model.layers.{i}.attn" for i in range(3)]
    group = SimpleNamespace(layer_names=layers, kv_cache_spec=spec)
    parallel = SimpleNamespace(
        tensor_parallel_size=changes.get("ranks", 2),
        pipeline_parallel_size=changes.get("pipeline", 1),
        decode_context_parallel_size=changes.get("context", 1),
        prefill_context_parallel_size=1,
    )
    model = SimpleNamespace(
        model=str(folder),
        tokenizer=str(folder),
        revision=None,
        tokenizer_revision=None,
        dtype="torch.bfloat16",
        quantization=None,
        hf_overrides=changes.get("overrides", {}),
        hf_config=SimpleNamespace(to_dict=lambda: changes.get("resolved", {"rope_theta": 1e4})),
        max_model_len=changes.get("max_model_len", 4096),
        get_total_num_kv_heads=lambda: 8,
    )
    vars(model).update(changes.get("model", {}))
    config = SimpleNamespace(
        parallel_config=parallel,
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        load_config=SimpleNamespace(load_format=changes.get("load_format", "auto")),
        kv_transfer_config=SimpleNamespace(is_kv_consumer=True, is_kv_producer=changes.get("saves", True)),
        speculative_config=changes.get("speculative"),
    )
    return config, SimpleNamespace(kv_cache_groups=[group] * changes.get("groups", 1))


def spec(kind: str = "FullAttentionSpec", **fields: Any) -> Any:
    values = {"block_size": 16, "num_kv_heads": 4, "head_size": 64, "dtype": "torch.bfloat16"} | fields
    return type(kind, (SimpleNamespace,), {})(**values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": 2}, "several cache groups"),
        ({"spec": spec("MLAAttentionSpec")}, "MLAAttentionSpec"),
        ({"spec": spec("SlidingWindowSpec")}, "--disable-hybrid-kv-cache-manager"),
        ({"groups": 2}, "--disable-hybrid-kv-cache-manager makes it one"),
        ({"cache_dtype": "fp8"}, "leave --kv-cache-dtype at auto"),
        ({"spec": spec(kv_quant_mode=1)}, "quantised"),
        ({"spec": spec(dtype="torch.float64")}, "run it in bfloat16, float16, float32"),
        ({"spec": spec(head_size_v=32)}, "heads of different sizes"),
        ({"spec": spec(non_causal=True)}, "not causal"),
        ({"pipeline": 2}, "use tensor parallelism"),
        ({"context": 2}, "leave context parallelism off"),
        ({"speculative": SimpleNamespace(method="eagle")}, "the drafts of eagle"),
        ({"spec": spec(block_size=48)}, "set block_tokens"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_cure(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match="cannot be shared") as caught:
        refuse(read_facts(*engine(**changes)), read_config({}))
    assert says in str(caught.value)


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("method", [None, "ngram"])
def test_what_can_be_shared_is_not(block: int, method: str | None) -> None:
    speculative = SimpleNamespace(method=method) if method else None
    refuse(read_facts(*engine(spec=spec(block_size=block), speculative=speculative)), read_config({}))


def test_windows_among_full_attention_are_shared_where_vllm_keeps_their_blocks() -> None:
    refuse(read_facts(*engine(spec=spec(sliding_window=4096))), read_config({}))


def test_every_reason_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse(read_facts(*engine(pipeline=2, context=2, cache_dtype="fp8")), read_config({}))
    assert str(caught.value).count(";") >= 2


def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_ranks_have_namespaces_of_their_heads(tmp_path: Path) -> None:
    config, cache = engine(model_folder(tmp_path), saves=False)
    setup = setup_of(config, read_facts(config, cache), read_config({}), 1)
    assert [(s.layout.head_begin, s.layout.head_end) for s in setup.specs] == [(0, 4), (4, 8)]
    assert (setup.model_id, setup.layout.layers, setup.layout.dtype) == (tmp_path.name, 3, "bfloat16")
    assert (setup.loads, setup.saves) == (True, False)
    assert setup.spec_of(0, "ab" * 16).adapter_digest == bytes.fromhex("ab" * 16)
    odd = dataclasses.replace(read_facts(config, cache), rank_heads=3)
    with pytest.raises(ConfigError, match="this division is not supported"):
        setup_of(config, odd, read_config({}), 0)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    config, cache = engine(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer's files"):
        setup_of(config, read_facts(config, cache), read_config({}), 0)


def test_ranges_of_heads_cover_the_model() -> None:
    assert [head_range(rank, 2, 8) for rank in range(2)] == [(0, 4), (4, 8)]
    assert [head_range(rank, 4, 2) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


def test_a_version_that_was_never_tried_is_refused() -> None:
    for version in ("0.32.0+cpu", "0.33.1", "0.33.0rc1"):
        check_version(version, any_version=False)
    for version in ("0.31.0", "0.34.0", "1.32.0", "dev"):
        with pytest.raises(ConfigError, match=r"0\.32 and 0\.33.*any_vllm_version"):
            check_version(version, any_version=False)
        check_version(version, any_version=True)
