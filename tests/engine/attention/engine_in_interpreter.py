"""An engine over Triton's attention in the interpreter, and over torch's: what both say, as JSON.

TRITON_INTERPRET=1 python -m tests.engine.attention.engine_in_interpreter
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import cast
from unittest.mock import patch

import torch

from engine.attention.padded import PaddedAttention
from engine.attention.triton_attention import TritonAttention
from engine.attention.triton_copy import gather
from engine.attention.triton_tuning import Tuning
from engine.config import EngineConfig
from engine.decode_graphs import PagedDecode
from engine.device import HostDevice
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.tokenizer import Tokenizer
from engine.types import GenerationRequest, SamplingParams
from engine.weights import load_weights
from kvstore.clock import MonotonicClock
from tests.engine.attention import interpreter  # noqa: F401 - mends it
from tests.tiny_model import make_tiny_model

SMALL = Tuning(16, 4, 1, 16, 16, 4, 1, split_tokens=32)


def said(folder: Path, attention: PagedDecode) -> tuple[list[list[int]], list[bytes]]:
    """Greedy tokens of three prompts, through a device's runner, and the blocks that were gathered."""
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config, torch.float32)
    settings = EngineConfig(
        batch_invariant=False, running_max=3, max_model_len=96, pool_blocks=16, block_tokens=16
    )
    with patch("engine.device_runner._attention_on", lambda *_: attention):
        engine = Engine(
            settings, config, weights, cast(Tokenizer, None), MonotonicClock(), device=HostDevice()
        )
    answers: dict[str, list[int]] = {}
    blocks: list[bytes] = []
    for index, length in enumerate((5, 33, 16)):
        prompt = tuple(3 + (7 * i + index) % 250 for i in range(length))
        params = SamplingParams(4 + index, temperature=0.0, ignore_eos=True)
        engine.admit(GenerationRequest(str(index), 0, prompt, params))
    while engine.has_work():
        result = engine.step()
        blocks += [block.payload.tobytes() for block in result.blocks]
        for event in result.events:
            answers.setdefault(event.request_id, []).append(event.token_id)
    return list(answers.values()), blocks


def main() -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = make_tiny_model(Path(path) / "tiny")
        heads = ModelConfig.from_folder(folder).heads
        torchs, blocks = said(folder, PaddedAttention((None, None)))
        with (
            patch("engine.device_pool._gather_kernel", lambda _: gather),
            patch("engine.device_pool.GATHER_MIN", 1),
        ):
            _, gathered = said(folder, PaddedAttention((None, None)))
        tritons, _ = said(folder, TritonAttention(heads, (None, None), tuning=SMALL))
    same = blocks == gathered
    print(json.dumps({"triton": tritons, "torch": torchs, "same_blocks": same, "blocks": len(blocks)}))


if __name__ == "__main__":
    main()
