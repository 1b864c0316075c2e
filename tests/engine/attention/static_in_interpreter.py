"""Recordable Triton attention in the interpreter, beside plain torch's: what differed, as JSON.

    TRITON_INTERPRET=1 python -m tests.engine.attention.static_in_interpreter

A process of its own, as in_interpreter.py is.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import cast
from unittest.mock import patch

import torch

from engine.attention.padded import PaddedAttention
from engine.attention.triton_static import StaticTritonAttention
from engine.attention.triton_tuning import Tuning
from engine.config import EngineConfig
from engine.decode_graphs import PagedDecode
from engine.device import HostDevice
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.pool import KVPool
from engine.tokenizer import Tokenizer
from engine.types import GenerationRequest, SamplingParams
from engine.weights import load_weights
from kvstore.nouns import KVLayout
from tests.engine.attention import interpreter  # noqa: F401 - mends it
from tests.tiny_model import make_tiny_model

SMALL = Tuning(16, 4, 1, 16, 16, 4, 1, split_tokens=32)
LAYOUT = KVLayout(2, 0, 2, 16, "float32", block_tokens=8)
ROWS, BLOCKS, HEADS, SLOTS = 4, 12, 6, 40


def plans_that_differ() -> list[str]:
    """One plan a backend, refreshed for three steps: contexts of one token to full tables; NaN behind."""
    generator = torch.Generator().manual_seed(0)
    pool = KVPool(LAYOUT, SLOTS)
    for layer in range(2):
        pool.keys(layer).normal_(generator=generator)
        pool.values(layer).normal_(generator=generator)
        pool.keys(layer)[-LAYOUT.block_tokens :] = pool.values(layer)[-LAYOUT.block_tokens :] = torch.nan
    tables = torch.zeros(ROWS, BLOCKS, dtype=torch.int32)
    positions = torch.zeros(ROWS, dtype=torch.int64)
    triton = StaticTritonAttention(HEADS, (None, 20), 3, tuning=SMALL)
    plans = [backend.decode_plan(tables, positions, pool) for backend in (triton, PaddedAttention((None, 20), 3))]
    different = []
    for lengths in ([1, 8, 9, BLOCKS * 8], [40, 17, 96, 3], [1, 1, 1, 1]):
        positions.copy_(torch.tensor(lengths) - 1)
        tables.fill_(SLOTS - 1)
        for row, length in enumerate(lengths):
            used = -(-length // 8)
            tables[row, :used] = torch.randperm(SLOTS - 1, generator=generator)[:used]
        queries = torch.randn(ROWS, HEADS, 16, generator=generator)
        for layer in range(2):
            outs = [torch.empty_like(queries) for _ in plans]
            for plan, out in zip(plans, outs, strict=True):
                plan.refresh()
                plan.attend(layer, queries, out)
            if not torch.allclose(outs[0], outs[1], atol=1e-5, rtol=1e-4):
                different.append(f"{lengths}, layer {layer}: {(outs[0] - outs[1]).abs().max()}")
    return different


def said(folder: Path, attention: PagedDecode) -> list[list[int]]:
    """Greedy tokens of three prompts, through a device's runner."""
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config, torch.float32)
    settings = EngineConfig(
        batch_invariant=False, running_max=3, max_model_len=96, pool_blocks=16, block_tokens=16
    )
    with patch("engine.device_runner._attention_on", lambda *_: attention):
        engine = Engine(settings, config, weights, cast(Tokenizer, None), device=HostDevice())
    answers: dict[str, list[int]] = {}
    for index, length in enumerate((5, 33, 16)):
        prompt = tuple(3 + (7 * i + index) % 250 for i in range(length))
        params = SamplingParams(4 + index, temperature=0.0, ignore_eos=True)
        engine.admit(GenerationRequest(str(index), 0, prompt, params))
    while engine.has_work():
        for event in engine.step().events:
            answers.setdefault(event.request_id, []).append(event.token_id)
    return list(answers.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = make_tiny_model(Path(path) / "tiny")
        heads = ModelConfig.from_folder(folder).heads
        here = said(folder, StaticTritonAttention(heads, (None, None), tuning=SMALL))
        there = said(folder, PaddedAttention((None, None)))
    print(json.dumps({"different": plans_that_differ(), "triton": here, "torch": there}))


if __name__ == "__main__":
    main()
