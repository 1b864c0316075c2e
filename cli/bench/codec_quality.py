"""What a model loses when its KV went through a codec: perplexity and greedy tokens under teacher forcing.

Windows of a text are computed with the engine's own model. In every layer, once K (after RoPE) and V of all
tokens are in the pool and before anyone attends to them, they are replaced by what the codec makes of them,
block by block: so later layers compute from what a reader would have got. That is harsher than serving,
where only what was cached is lossy. Costs a forward pass a codec and window: about 3 s for 1,024 tokens of
135M parameters on two cores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention.base import AttentionPlan, Segment
from engine.attention.sdpa import SdpaAttention
from engine.models.config import ModelConfig
from engine.models.llama import LlamaModel, StepInput
from engine.pool import KVPool
from engine.tokenizer import Tokenizer
from engine.weights import load_weights
from kvstore.codecs import Codec
from kvstore.nouns import BLOCK_TOKENS, KVLayout


@dataclass(frozen=True, slots=True)
class Seen:
    """One codec over all windows. `greedy` are the most likely next tokens, a row a window."""

    perplexity: float
    greedy: torch.Tensor
    kept_lossless: int  # layers of windows that could not be encoded


class Quality:
    """A model in float32 and the windows of a text. One thread's."""

    def __init__(self, folder: Path, text: str, windows: int, window_tokens: int) -> None:
        """Raises ModelError's kinds, and ValueError for a text that is too short."""
        config = ModelConfig.from_folder(folder)
        tensors = load_weights(folder, config, torch.float32).tensors
        ids = Tokenizer.from_folder(folder).encode(text)
        if len(ids) < windows * window_tokens:
            raise ValueError(
                f"the text has {len(ids)} tokens of {windows * window_tokens}: give a longer one"
            )
        self.layout = KVLayout(config.layers, 0, config.kv_heads, config.head_dim, "float32")
        self._windows = torch.tensor(ids[: windows * window_tokens]).view(windows, window_tokens)
        self._model = LlamaModel(config, tensors, window_tokens)
        self._blocks = window_tokens // BLOCK_TOKENS
        self._pool = KVPool(self.layout, self._blocks)

    def __len__(self) -> int:
        return len(self._windows)

    def blocks(self) -> list[memoryview]:
        """The last window's KV as payloads: real ones to measure speed with."""
        return [self._pool.read_block(slot).data for slot in range(self._blocks)]

    @torch.inference_mode()
    def window(self, index: int, codec: Codec | None) -> tuple[float, torch.Tensor, int]:
        """Summed loss, greedy tokens and layers left lossless of one window."""
        tokens = self._windows[index]
        rows = torch.arange(len(tokens))
        segment = Segment(0, len(tokens), 0, tuple(range(self._blocks)))
        plan: AttentionPlan = SdpaAttention(self._model.config.windows).plan([segment], self._pool)
        lossy = _LossyPlan(plan, self._pool, codec, self.layout)
        step = StepInput(tokens, rows, rows, rows[:-1])
        logits = self._model.logits(self._model.forward(step, self._pool, lossy))
        loss = F.cross_entropy(logits, tokens[1:], reduction="sum")
        return float(loss), logits.argmax(-1), lossy.kept_lossless

    def seen(self, results: Sequence[tuple[float, torch.Tensor, int]]) -> Seen:
        """All windows of one codec, as `window` answered them."""
        greedy = torch.stack([result[1] for result in results])
        perplexity = math.exp(sum(result[0] for result in results) / greedy.numel())
        return Seen(perplexity, greedy, sum(result[2] for result in results))


def divergence(lossless: Seen, lossy: Seen) -> float:
    """The share of next tokens that greedy decoding would choose otherwise, the past being the text's."""
    return float((lossless.greedy != lossy.greedy).float().mean())


def first_divergence(lossless: Seen, lossy: Seen) -> float:
    """How many tokens go by, in the middle, until greedy decoding would choose otherwise for the first time,
    counted from the middle of each window: median over windows (none: the rest of the window)."""
    half = lossless.greedy.shape[1] // 2
    differ = (lossless.greedy != lossy.greedy)[:, half:]
    return statistics.median(int(row.argmax()) if row.any() else len(row) for row in differ.int())


class _LossyPlan:
    """An AttentionPlan that puts the pool's KV of each layer through a codec before attending."""

    def __init__(self, inner: AttentionPlan, pool: KVPool, codec: Codec | None, layout: KVLayout) -> None:
        self._inner, self._pool, self._codec = inner, pool, codec
        # Layers are alike to a codec: so one layer's blocks pass for the layers of one block.
        self._layout = KVLayout(pool.n_slots, 0, layout.head_end, layout.head_dim, layout.dtype)
        self.kept_lossless = 0

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        if self._codec is not None:
            keys, values = self._pool.keys(layer), self._pool.values(layer)
            shape = (self._pool.n_slots, BLOCK_TOKENS, *keys.shape[1:])
            both = torch.stack((keys.view(shape), values.view(shape)), 1)
            payload = both.numpy().reshape(-1).view(np.uint8).data
            encoded = self._codec.encode(self._layout, payload)
            if encoded is None:
                self.kept_lossless += 1
            else:
                self._codec.decode(self._layout, encoded, payload)
                keys.copy_(both[:, 0].reshape(keys.shape))
                values.copy_(both[:, 1].reshape(values.shape))
        self._inner.attend(layer, queries, out)
