"""What one step computes, laid out for the model: rows of all its sequences, one after another.

chunk    `rows` tokens of one sequence: one row of a decoding one, a piece of a prompt, drafts to verify
batch    token ids, positions and places in the pool, a row each; a segment a chunk for attention; and
         which rows need logits
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.attention.base import Segment
from engine.sequence import Sequence

__all__ = ["Batch", "Chunk", "make_batch"]


class Chunk(NamedTuple):
    """The next `rows` tokens of a sequence, and guesses of those behind them, a row each, to be verified."""

    sequence: Sequence
    rows: int
    drafts: tuple[int, ...] = ()  # only where it draws

    @property
    def draws(self) -> bool:
        """Is nothing left to compute before the sequence's next token?"""
        return self.sequence.pending == self.rows


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows, on the host. `logits_rows` are those that need logits, in the order of their chunks:
    of one that draws the last of its tokens, and its drafts."""

    token_ids: torch.Tensor  # int64 [rows]
    positions: torch.Tensor  # int64 [rows]
    pool_rows: torch.Tensor  # int64 [rows]: where each row's K and V go
    segments: tuple[Segment, ...]
    logits_rows: torch.Tensor  # int64 [drawing chunks and drafts]


def make_batch(chunks: Seq[Chunk], block_tokens: int) -> Batch:
    """Some 2 us a decoding sequence, 20 us a piece of a prompt."""
    token_ids: list[int] = []
    positions: list[int] = []
    pool_rows: list[int] = []
    segments = []
    logits_rows: list[int] = []
    for chunk in chunks:
        sequence, row, count = chunk.sequence, len(token_ids), chunk.rows + len(chunk.drafts)
        begin, end, slots = sequence.computed, sequence.computed + count, sequence.slots
        segments.append(Segment(row, count, begin, slots))
        token_ids += sequence.tokens[begin : begin + chunk.rows]
        token_ids += chunk.drafts
        positions += range(begin, end)
        pool_rows += [
            slots[at // block_tokens] * block_tokens + at % block_tokens for at in range(begin, end)
        ]
        if chunk.draws:
            logits_rows += range(row + chunk.rows - 1, row + count)
    return Batch(_ids(token_ids), _ids(positions), _ids(pool_rows), tuple(segments), _ids(logits_rows))


def _ids(column: list[int]) -> torch.Tensor:
    return torch.tensor(column, dtype=torch.int64)
