"""Hugging Face transformers as one process of the bench: one forward pass a step over its own cache."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers

from cli.bench.engines.plan import prompts
from cli.bench.jsonlines import answer

_model: list[Any] = []


def start(folder: str, dtype: str, threads: int, **_sizes: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    _model[:] = [model.eval()]
    return {"what": f"transformers {transformers.__version__}, torch {torch.__version__}"}


@torch.inference_mode()
def prefill(tokens: int, seed: int, vocabulary: int) -> dict[str, float]:
    ids = torch.tensor(prompts(1, tokens, seed, vocabulary))
    began = time.perf_counter()
    _next(ids, None)
    return {"seconds": time.perf_counter() - began}


@torch.inference_mode()
def decode(batch: int, prompt: int, tokens: int, seed: int, vocabulary: int) -> dict[str, float]:
    ids, cache = _next(torch.tensor(prompts(batch, prompt, seed, vocabulary)), None)
    began = time.perf_counter()
    for _ in range(tokens - 1):
        ids, cache = _next(ids, cache)
    return {"tokens_s": batch * (tokens - 1) / (time.perf_counter() - began)}


def _next(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """The greedy next token of each row, [batch, 1], logits of the last position alone."""
    (model,) = _model
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


if __name__ == "__main__":
    answer({"start": start, "prefill": prefill, "decode": decode})
