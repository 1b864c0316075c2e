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
    """One step's rows. `logits_rows` are those that need logits, in the order of their chunks: of one that
    draws the last of its tokens, and its drafts."""

    token_ids: torch.Tensor  # int64 [rows]
    positions: torch.Tensor  # int64 [rows]
    pool_rows: torch.Tensor  # int64 [rows]: where each row's K and V go
    segments: tuple[Segment, ...]
    logits_rows: torch.Tensor  # int64 [drawing chunks and drafts]


def make_batch(chunks: Seq[Chunk], block_tokens: int) -> Batch:
    """Some 20 us a chunk."""
    rows = sum(chunk.rows + len(chunk.drafts) for chunk in chunks)
    token_ids, positions = torch.empty(2, rows, dtype=torch.int64)
    pool_rows = torch.empty(rows, dtype=torch.int64)
    segments: list[Segment] = []
    logits_rows: list[int] = []
    row = 0
    for chunk in chunks:
        sequence, count = chunk.sequence, chunk.rows + len(chunk.drafts)
        begin, end, taken = sequence.computed, sequence.computed + count, slice(row, row + count)
        token_ids[taken] = torch.tensor([*sequence.tokens[begin : begin + chunk.rows], *chunk.drafts])
        at = torch.arange(begin, end)
        positions[taken] = at
        pool_rows[taken] = torch.tensor(sequence.slots)[at // block_tokens] * block_tokens + at % block_tokens
        segments.append(Segment(row, count, begin, sequence.slots))
        if chunk.draws:
            logits_rows += range(row + chunk.rows - 1, row + count)
        row += count
    return Batch(
        token_ids, positions, pool_rows, tuple(segments), torch.tensor(logits_rows, dtype=torch.int64)
    )
