"""Promise: parts of every family's model add up to the model, however many ranks there are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.base import Segment
from engine.batch import Batch
from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.parallel.shares import HeadShare
from engine.runner import ModelRunner
from engine.weights import load_weights
from kvstore.nouns import KVLayout
from tests.tiny_model import make_tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "uneven-width": {"intermediate_size": 101},
    "tied": {"tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 13},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "attention_bias": None},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}


class ThreadedSum:
    """Ranks as threads of this process."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks)
        self._parts: list[torch.Tensor | None] = [None] * ranks

    def of(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def total(part: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = part
            self._barrier.wait(30)
            result = torch.stack([part for part in self._parts if part is not None]).sum(0)
            self._barrier.wait(30)
            return result

        return total


def logits_of(folder: Path, ranks: int) -> list[torch.Tensor]:
    """Of all rows of one prompt, of every rank."""
    config = EngineConfig(threads=1, tensor_parallel=ranks, batch_invariant=False)
    model_config = ModelConfig.from_folder(folder)
    sums = ThreadedSum(ranks)
    rows = torch.arange(40)
    batch = Batch((rows * 7 + 3) % 250, rows, rows, (Segment(0, 40, 0, (0, 1)),), rows)

    def compute(rank: int) -> torch.Tensor:
        share = HeadShare(rank, ranks)
        own = share.config(model_config)
        weights = load_weights(folder, model_config, torch.float32, share.tensor)
        layout = share.layout(KVLayout(own.layers, 0, own.kv_heads, own.head_dim, "float32"))
        return ModelRunner(config, own, weights, layout, 4, 128, sum_parts=sums.of(rank)).run(batch)

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(compute, range(ranks)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_add_up_to_the_model(family: str, ranks: int, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = make_tiny_model(tmp_path, **(FAMILIES[family] | heads))
    (whole,) = logits_of(folder, 1)
    for rank in logits_of(folder, ranks):
        torch.testing.assert_close(rank, whole, rtol=0, atol=1e-4)


def test_a_share_of_the_outputs_bias_is_added_once() -> None:
    raw = {"architectures": ["LlamaForCausalLM"], "attention_bias": True}
    raw |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    whole = ModelConfig.from_dict(raw | {"vocab_size": 9}, "here")
    assert [HeadShare(rank, 2).config(whole).biased for rank in (0, 1)] == [
        ("q", "k", "v", "o"),
        ("q", "k", "v"),
    ]
