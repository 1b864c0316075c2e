"""The default model, as pulled, is the model it claims to be: checked against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.config import EngineConfig
from engine.detokenizer import IncrementalDetokenizer
from engine.engine import Engine
from engine.model_cache import ModelCache, cache_root
from engine.monolithic import generate
from engine.registry import DEFAULT_MODEL, check_folder
from engine.tokenizer import Tokenizer
from engine.types import GenerationRequest, SamplingParams

pytestmark = pytest.mark.model

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\ttabs \r\n",
    "In 1984, 12345 + 67890 = 80235.",
    "naïve café, Grüße, 世界, Привет, שלום, 😀👩‍👩‍👧‍👦",
    "def f(x):\n    return x['a'] - don't\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>",
    "\u200b\ufeff\x00\x7f",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Hi 你好"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
    ],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return ModelCache(cache_root()).path(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special=False) == text == theirs.decode(ids)


@pytest.mark.parametrize("messages", CHATS)
def test_chats_equal_transformers(ours: Tokenizer, theirs: Any, messages: list[dict[str, str]]) -> None:
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == text
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages) == ids


def test_it_is_the_model_the_runner_takes(folder: Path, ours: Tokenizer) -> None:
    config = check_folder(folder)
    assert (config.layers, config.hidden_size, config.heads, config.kv_heads) == (30, 576, 9, 3)
    assert config.eos_token_ids == ours.eos_token_ids == (2,)
    assert ours.vocab_size == config.vocab_size == 49152


def test_transformers_gets_a_sensible_answer_from_it(folder: Path, ours: Tokenizer) -> None:
    """What the order of Q and K rows decides: left as llama.cpp has them, this is noise."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([ours.encode_chat(CHATS[0])])
    with torch.inference_mode():
        output = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    detokenizer = IncrementalDetokenizer(ours)
    text = "".join(detokenizer.push(i) for i in output.tolist()) + detokenizer.flush()
    assert text == "The capital of France is Paris."


@pytest.mark.parametrize("messages", CHATS)
def test_the_engine_answers_what_transformers_answers(folder: Path, messages: list[dict[str, str]]) -> None:
    engine = Engine.load(folder, EngineConfig(pool_blocks=16))
    prompt = engine.tokenizer.encode_chat(messages)
    request = GenerationRequest("r", 0, tuple(prompt), SamplingParams(max_tokens=24, temperature=0.0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert list(generate(engine, request)) == output[0, len(prompt) :].tolist()
