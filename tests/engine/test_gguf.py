"""A GGUF file becomes a folder that computes the same model; a damaged or foreign one a clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from engine.errors import ModelCorrupt, ModelUnsupported
from engine.gguf import GgufModel, rows_from_llama_cpp
from engine.models.config import ModelConfig
from engine.models.rope import inverse_frequencies
from engine.progress import silent
from engine.registry import check_folder
from engine.tokenizer import Tokenizer
from engine.weights import load_weights
from tests.engine.conftest import EngineFactory, Logits, prompt, request, run
from tests.engine.gguf_file import TOKENS, write_family_gguf, write_gguf
from tests.engine.models.family_models import CASES, family_model, greedy, save_family_model
from tests.tiny_model import make_tiny_model, tiny_config

GGUF_CASES = [case for case in CASES if case != "llama-llama3-rope"]
"""Llama 3's scaling is a tensor, of which one original context is known: tested below."""


def convert(source: Path, folder: Path) -> Path:
    folder.mkdir()
    GgufModel.open(source).write_folder(folder, silent)
    return folder


def converted(tmp_path: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    source = tmp_path / "model.gguf"
    tensors = write_gguf(source, **options)
    return convert(source, tmp_path / "folder"), tensors


def test_every_tensor_comes_back_row_by_row(tmp_path: Path) -> None:
    folder, original = converted(tmp_path)
    config = check_folder(folder)
    weights = load_weights(folder, config, torch.float32)
    for name, tensor in original.items():
        assert torch.equal(weights.tensors[name], tensor), name


def test_the_config_comes_back(tmp_path: Path) -> None:
    folder, _ = converted(tmp_path, rope_theta=100000.0)
    wanted = tiny_config(rope_theta=100000.0, tie_word_embeddings=True, vocab_size=len(TOKENS))
    assert ModelConfig.from_folder(folder) == ModelConfig.from_dict(wanted, "here")


def test_transformers_computes_the_same_from_it(tmp_path: Path) -> None:
    folder, _ = converted(tmp_path)
    plain = make_tiny_model(tmp_path / "plain", seed=5, tie_word_embeddings=True, vocab_size=len(TOKENS))
    ids = torch.arange(3, 40)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, plain)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.Q4_0, Kind.F16, Kind.BF16])
def test_quantised_tensors_are_dequantised(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    folder, original = converted(tmp_path, quantised=kind)
    weights = load_weights(folder, check_folder(folder), torch.float32)
    for name, tensor in original.items():
        close = 0.2 if kind in (Kind.Q4_0, Kind.Q4_1) else 0.02
        assert (weights.tensors[name] - tensor).abs().max() <= close * tensor.abs().max(), name


def test_rows_are_put_back_in_order() -> None:
    """Two heads of width 4: pairs side by side become halves one after the other."""
    theirs = np.array([[0], [2], [1], [3], [4], [6], [5], [7]], dtype=np.float32)
    assert rows_from_llama_cpp(theirs, 2).ravel().tolist() == list(range(8))


def test_the_tokenizer_and_its_template_come_back(tmp_path: Path) -> None:
    folder, _ = converted(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("<|im_start|>hello world 12")
    assert [tokenizer.id_to_token(i) for i in ids] == [
        *("<|im_start|>", "hello", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2")
    ]
    assert tokenizer.decode(ids) == "hello world 12"
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]).endswith("<|im_start|>assistant\n")


def test_a_bos_token_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    folder, _ = converted(tmp_path, add_bos=True)
    tokenizer = Tokenizer.from_folder(folder)
    plain = tokenizer.encode("hello")
    assert tokenizer.encode("hello", add_special=True) == [1, *plain]


def test_llama3_words_keep_digits_in_threes(tmp_path: Path) -> None:
    folder, _ = converted(tmp_path, pre="llama-bpe")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.id_to_token(tokenizer.encode("12")[0]) == "12"
    assert tokenizer.decode(tokenizer.encode("don't 1234\n\n x")) == "don't 1234\n\n x"


def test_llama3_rope_is_recovered_from_its_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, stretched = (
        ModelConfig.from_dict(tiny_config(rope_theta=500000.0, rope_scaling=s), "here")
        for s in (None, scaling)
    )
    factors = (inverse_frequencies(plain) / inverse_frequencies(stretched)).numpy()
    folder, _ = converted(tmp_path, rope_theta=500000.0, extra={"rope_freqs.weight": factors})
    assert ModelConfig.from_folder(folder).rope_scaling == stretched.rope_scaling


def test_rope_factors_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)})
    with pytest.raises(ModelUnsupported, match="rope"):
        GgufModel.open(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "case", ["llama-biases", "llama-yarn-rope", "mistral-window", "qwen2-window", "qwen2-tied", "qwen3-yarn"]
)
def test_every_family_computes_what_transformers_does(
    case: str, tmp_path: Path, make_engine: EngineFactory, seen_logits: Logits
) -> None:
    """From the file alone: biases, norms of heads, the order of rows, rope scaling, windows."""
    model = family_model(case, vocab_size=len(TOKENS))
    write_family_gguf(tmp_path / "m.gguf", model)
    engine = make_engine(convert(tmp_path / "m.gguf", tmp_path / "folder"), step_tokens_max=64)
    engine.admit(request("probe", prompt(150), 3, seed=1))
    run(engine)
    for index, logits in enumerate(greedy(model, prompt(150), 3)):
        torch.testing.assert_close(seen_logits[1, 150 + index], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", GGUF_CASES)
def test_every_familys_tensors_and_settings_come_back(case: str, tmp_path: Path) -> None:
    model = family_model(case, vocab_size=len(TOKENS))
    write_family_gguf(tmp_path / "m.gguf", model)
    folder = convert(tmp_path / "m.gguf", tmp_path / "folder")
    kept = check_folder(save_family_model(model, tmp_path / "kept"))
    config = check_folder(folder)
    if config.windows == (None,) * config.layers and kept.model_type == "mistral":
        kept = replace(kept, model_type="llama")  # all that a GGUF file tells
    assert config == kept
    weights = load_weights(folder, config, torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.tensors[name], tensor), name


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("qwen2", "qwen2.attention.sliding_window", 64),
        ("qwen3", "qwen3.rope.dimension_count", 8),
        ("llama", "llama.rope.scaling.attn_factor", 0.5),
        ("qwen3", "qwen3.rope.scaling.yarn_log_multiplier", 0.1),
        ("llama", "llama.expert_count", 8),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    case: str, key: str, value: float, tmp_path: Path
) -> None:
    write_family_gguf(tmp_path / "m.gguf", family_model(case, vocab_size=len(TOKENS)), {key: value})
    with pytest.raises(ModelUnsupported, match=key):
        GgufModel.open(tmp_path / "m.gguf")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", architecture="gemma")
    with pytest.raises(ModelUnsupported, match="gemma"):
        GgufModel.open(tmp_path / "m.gguf")


@pytest.mark.parametrize("options", [{"tokenizer": "bert"}, {"pre": "deepseek-llm"}])
def test_another_tokenizer_is_named(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ModelUnsupported, match=next(iter(options.values()))):
        converted(tmp_path, **options)


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(64, dtype=np.float32)}
    with pytest.raises(ModelUnsupported, match=r"blk\.0\.attn_sinks\.weight"):
        converted(tmp_path, extra=extra)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelCorrupt, match=r"blk\.1\.ffn_up"):
        converted(tmp_path, left_out="blk.1.ffn_up.weight")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.05, 0.5, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source)
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelCorrupt, match=r"model\.gguf"):
        convert(source, tmp_path / "folder")
