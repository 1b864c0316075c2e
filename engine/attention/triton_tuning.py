"""Shapes of the Triton kernels' tiles: a table, not a search, so that every process picks the same.

A tuning is part of what decides a result's bits. `benchmarks/gpu.py --sweep` measures others beside these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

__all__ = ["Tuning", "query_rows"]

ROWS_MIN: Final = 16
"""Of a tile that tensor cores multiply."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """`decode_tile` and `prefill_tile` are tokens, powers of two of at least 16; `prefill_rows` query rows
    (positions times the group), likewise; `split_tokens` (a multiple of decode_tile) is a split in
    batch-invariant mode, and the least there is otherwise. Warps and stages are Triton's."""

    decode_tile: int
    decode_warps: int
    decode_stages: int
    prefill_rows: int
    prefill_tile: int
    prefill_warps: int
    prefill_stages: int
    split_tokens: int = 512

    def __post_init__(self) -> None:
        sizes = (self.decode_tile, self.prefill_tile, self.prefill_rows)
        if any(size < ROWS_MIN or size & (size - 1) for size in sizes):
            raise ValueError(f"tiles must be powers of two of at least {ROWS_MIN}, got {sizes}")
        if self.split_tokens % self.decode_tile:
            raise ValueError(f"split_tokens {self.split_tokens} is no multiple of tile {self.decode_tile}")

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype, *, quantised: bool = False) -> Tuning:
        """For queries of `dtype`. Chosen by what compilers say of sm_90: nothing spills, and of decode two to
        four programs share a multiprocessor, so that one's loads hide another's products."""
        if dtype.itemsize > 2:  # no tensor cores: tiles that fit registers
            rows = 32 if head_dim <= 64 else 16
            return cls(32 if head_dim <= 128 else 16, 4, 2, rows, rows, 4, 2)
        if head_dim > 128:
            return cls(32, 4, 3, 128, 32, 8, 2)
        return cls(128 if head_dim <= 64 and not quantised else 64, 4, 3, 128, 64, 8, 3)


def query_rows(group: int, at_least: int) -> int:
    """Rows of a query tile that holds a whole group: a power of two."""
    rows = max(at_least, ROWS_MIN)
    while rows < group:
        rows *= 2
    return rows
