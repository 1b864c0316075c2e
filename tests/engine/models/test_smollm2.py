"""Promise: on the real model, in float32, 100 greedy tokens for each of 20 prompts are transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from engine.monolithic import generate_all
from engine.registry import DEFAULT_MODEL, resolve_model
from engine.types import GenerationRequest, SamplingParams
from tests.engine.conftest import EngineFactory

TOKENS = 100
ASKED = (
    "Write a haiku about rain.",
    "What is the capital of France?",
    "Explain what a cache is to a child.",
    "List three uses of a paper clip.",
    "Why is the sky blue?",
    "Translate 'good morning' into French.",
    "Write a Python function that reverses a list.",
    "What is 17 times 23? Show each step.",
    "Continue: once upon a time, in a lighthouse,",
    "Who wrote Hamlet, and when?",
)
PASSAGE = (
    "The harbour froze in January, and ships lay still until March. Eleven of them were grain ships, the "
    "twelfth carried clocks, 1,482 of them, packed in straw. Nobody in town knew who had ordered so many, "
    "and the captain, asked each Sunday after church, said only that time would tell."
)


def prompts(engine: Engine) -> list[tuple[int, ...]]:
    """Ten short ones, ten behind a passage; twenty in all."""
    texts = [*ASKED, *(f"{PASSAGE}\n\n{question}" for question in ASKED)]
    return [tuple(engine.tokenizer.encode_chat([{"role": "user", "content": text}])) for text in texts]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_greedy_output_equals_transformers(batch_invariant: bool, make_engine: EngineFactory) -> None:
    """Transformers reads prompt and output at once: if at every place its best token is the one that we
    have there, then by induction what it would have generated is our output."""
    folder = resolve_model(DEFAULT_MODEL)
    engine = make_engine(folder, batch_invariant=batch_invariant, pool_blocks=256)
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    asked = [GenerationRequest(f"{i}", 0, ids, sampling) for i, ids in enumerate(prompts(engine))]
    outputs = generate_all(engine, asked)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for request, output in zip(asked, outputs, strict=True):
        whole = torch.tensor([request.prompt_ids + output])
        with torch.inference_mode():
            logits = model(whole, use_cache=False, logits_to_keep=TOKENS + 1).logits[0, :-1]
        assert len(output) == TOKENS
        assert logits.argmax(-1).tolist() == list(output), f"prompt {request.request_id}"
