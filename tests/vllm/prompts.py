"""Prompts by length, the same in every run and process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

EDGES: Final = (31, 32, 33, 127, 128, 129, 255, 256, 300)
"""Around the edges of our blocks of 32 tokens and vLLM's of 128."""
LENGTHS: Final = (*EDGES, 1, 2, 63, 64, 65, 200, 257, 384, 385, 500, 513)
"""20 prompts."""
_FIRST_TOKEN, _VOCABULARY = 3, 259  # below are the tiny model's special tokens


def prompt(length: int, seed: int = 0, vocabulary: int = _VOCABULARY) -> list[int]:
    draw = random.Random(f"{seed} {length}")
    return [draw.randrange(_FIRST_TOKEN, vocabulary) for _ in range(length)]


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    return [prompt(length, seed) for length in lengths]


def loadable(length: int, block_size: int) -> int:
    """Tokens of a prompt that was stored whole which a load brings: whole vLLM blocks."""
    return length // block_size * block_size
