"""Which sequences compute how many tokens in the next step."""

from __future__ import annotations

from collections.abc import Iterable

from engine.batch import Chunk
from engine.sequence import Sequence

__all__ = ["schedule"]


def schedule(sequences: Iterable[Sequence], step_tokens_max: int) -> list[Chunk]:
    """A row of every decoding sequence, then chunks of prompts within what is left of the budget, both in
    the order given."""
    running = [sequence for sequence in sequences if not sequence.parked]
    chunks = [Chunk(sequence, 1) for sequence in running if sequence.pending == 1]
    budget = step_tokens_max - len(chunks)
    for sequence in running:
        if sequence.pending > 1 and budget > 0:
            rows = min(sequence.pending, budget)
            chunks.append(Chunk(sequence, rows))
            budget -= rows
    return chunks
