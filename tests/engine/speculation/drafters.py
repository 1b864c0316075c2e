"""Drafters that are always right, always wrong, or mean harm; and engines that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.speculation.base import Draft, DrafterFactory
from engine.tokenizer import Tokenizer
from engine.weights import DTYPES, load_weights
from kvstore.clock import ManualClock
from tests.tiny_model import VOCAB_SIZE

Guess = Callable[[Sequence[int], int], Sequence[int]]


class Guessing:
    """Guesses as it is told, one grade; remembers what it was asked and what it was told."""

    grades = 1

    def __init__(self, guess: Guess) -> None:
        self.guess = guess
        self.asked: list[int] = []
        self.told_: list[tuple[int, int]] = []

    def propose(self, tokens: Sequence[int], tokens_max: int) -> Draft:
        self.asked.append(tokens_max)
        guessed = self.guess(tokens, tokens_max)
        return Draft(guessed, [0] * len(guessed))

    def told(self, accepted: int, tried: int) -> None:
        assert 0 <= tried - accepted <= 1
        self.told_.append((accepted, tried))


def oracle(*known: Sequence[int]) -> DrafterFactory:
    """Knows whole texts, and guesses how the one that begins like the sequence goes on."""

    def guess(tokens: Sequence[int], tokens_max: int) -> Sequence[int]:
        for text in known:
            if list(text[: len(tokens)]) == list(tokens):
                return text[len(tokens) : len(tokens) + tokens_max]
        return ()

    return lambda: Guessing(guess)


def wrong(*known: Sequence[int]) -> DrafterFactory:
    """Never guesses what the oracle does."""
    right = oracle(*known)

    def guess(tokens: Sequence[int], tokens_max: int) -> Sequence[int]:
        truth = right().propose(tokens, tokens_max).tokens
        return [(token + 1) % VOCAB_SIZE for token in truth] + [5] * (tokens_max - len(truth))

    return lambda: Guessing(guess)


def engine_with(folder: Path, make_drafter: DrafterFactory | None, **settings: Any) -> Engine:
    config = EngineConfig(
        **({"pool_blocks": 64, "threads": 1, "speculation": "off", "draft_tokens_max": 8} | settings)
    )
    model = ModelConfig.from_folder(folder)
    weights = load_weights(folder, model, DTYPES[config.dtype])
    tokenizer, still = Tokenizer.from_folder(folder), ManualClock()  # what pays follows from the prior alone
    return Engine(config, model, weights, tokenizer, make_drafter=make_drafter, clock=still)
