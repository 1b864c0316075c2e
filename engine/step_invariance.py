"""Batch invariance of whole steps, proved on the machine at hand or refused.

The CPU's proof (engine/runner.py) goes part by part, since it knows what its parts are made of. On a device
the libraries choose kernels by shape, so what is asked is the promise itself: the same tokens computed as one
chunk, in pieces, beside another sequence and as decoding rows, through the same calls that serve requests,
must give the same bits. A second or two at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from engine.attention.base import Segment
from engine.batch import Batch
from kvstore.errors import ConfigError

__all__ = ["check_step_invariance"]

TOKENS: Final = 144
PIECES: Final = (1, 2, 3, 7, 16, 33, 129)
COMPANY: Final = 21
"""Rows of another sequence beside a piece."""

Run = Callable[[Batch], torch.Tensor]


def check_step_invariance(
    run: Run, *, vocab_size: int, block_tokens: int, n_slots: int, rows_max: int, tokens_max: int
) -> None:
    """`run` computes into a pool of `n_slots` slots that nobody uses yet; `rows_max` is the most rows that
    decode together, `tokens_max` the longest sequence. Raises ConfigError."""
    blocks = min(-(-TOKENS // block_tokens), (n_slots - 1) or 1)
    length = min(TOKENS, blocks * block_tokens, tokens_max)
    probe = _Probe(run, vocab_size, block_tokens, length, n_slots)
    whole = probe.logits([(0, length)])
    for size in PIECES:
        for begin in range(0, length - size + 1, max(size, length // 4)):
            _compare(probe.logits([(begin, size)]), whole[begin : begin + size], f"{size} rows of a prompt")
            beside = probe.logits([(begin, size)], company=min(COMPANY, block_tokens, length))
            _compare(beside, whole[begin : begin + size], f"{size} rows beside another prompt's")
    for rows in {min(rows, rows_max, length) for rows in (*PIECES, rows_max)}:
        decoded = probe.logits([(length - rows + i, 1) for i in range(rows)])
        _compare(decoded, whole[length - rows :], f"{rows} decoding rows")


class _Probe:
    """One sequence of random tokens whose KV is in the pool, and another for company where there is room."""

    def __init__(self, run: Run, vocab_size: int, block_tokens: int, length: int, n_slots: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._run = run
        self._tokens = torch.randint(vocab_size, (length,), generator=generator)
        self._block_tokens = block_tokens
        self._slots = tuple(range(-(-length // block_tokens)))
        self._others_slot = len(self._slots) if len(self._slots) < n_slots else None

    def logits(self, pieces: Sequence[tuple[int, int]], company: int = 0) -> torch.Tensor:
        """Of (begin, rows) pieces of the sequence, computed in one step; a copy."""
        batch, rows = self._batch(pieces, company if self._others_slot is not None else 0)
        return self._run(batch)[:rows].clone()

    def _batch(self, pieces: Sequence[tuple[int, int]], company: int) -> tuple[Batch, int]:
        segments = [*self._segments(pieces, company)]
        at = torch.cat([torch.arange(s.start, s.context) for s in segments])
        slots = torch.cat(
            [torch.tensor(s.slots)[torch.arange(s.start, s.context) // self._block_tokens] for s in segments]
        )
        pool_rows = slots * self._block_tokens + at % self._block_tokens
        rows = sum(count for _, count in pieces)
        return Batch(self._tokens[at], at, pool_rows, tuple(segments), torch.arange(len(at))), rows

    def _segments(self, pieces: Sequence[tuple[int, int]], company: int) -> Iterator[Segment]:
        row = 0
        for begin, count in pieces:
            yield Segment(row, count, begin, self._slots)
            row += count
        if company and self._others_slot is not None:
            yield Segment(row, company, 0, (self._others_slot,))


def _compare(computed: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(computed, expected):
        raise ConfigError(
            f"{what} give other bits than the same within a larger step, on this device: batch_invariant "
            "cannot be promised here, set it to false or device to cpu"
        )
