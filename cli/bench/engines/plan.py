"""What a run measures, what it measures it in, and how long it may wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

ENGINES: Final = ("kvstrata", "vllm", "transformers")
START_S: Final = 900.0  # vLLM compiles what it runs
CALL_S: Final = 600.0


class Decode(NamedTuple):
    """`batch` sequences decode together, each behind a prompt of `prompt` tokens."""

    batch: int
    prompt: int

    @property
    def name(self) -> str:
        return str(self.batch) if self.prompt == SHORT_PROMPT else f"{self.batch}x{self.prompt}"


SHORT_PROMPT: Final = 128


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int = 3  # and one before them that warms up and is thrown away
    prefills: tuple[int, ...] = (128, 512, 2048)
    decodes: tuple[Decode, ...] = (
        Decode(1, SHORT_PROMPT),
        Decode(4, SHORT_PROMPT),
        Decode(16, SHORT_PROMPT),
        Decode(16, 1024),
    )
    tokens: int = 64  # decoded a sequence

    @property
    def context_max(self) -> int:
        prompts = (*self.prefills, *(decode.prompt for decode in self.decodes))
        return max(prompts) + self.tokens + 1


QUICK: Final = Plan(rounds=1, prefills=(16, 32), decodes=(Decode(1, SHORT_PROMPT), Decode(2, 16)), tokens=4)
"""Proves that everything runs; its figures mean nothing."""


def prompts(batch: int, length: int, seed: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, the same for every engine, with nothing in them that repeats."""
    numbers, state = [], seed * 2_654_435_761 % (1 << 32) or 1
    for _ in range(batch * length):
        state = (1_103_515_245 * state + 12_345) % (1 << 31)
        numbers.append((state >> 8) % vocabulary)
    return [numbers[i * length : (i + 1) * length] for i in range(batch)]
