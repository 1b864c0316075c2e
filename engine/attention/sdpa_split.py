"""Decode attention over parts of a long context, joined by their sums (Flash-Decoding, Dao et al. 2023).

torch's own attention for the CPU shares out (sequence, head) pairs over threads. One query of one sequence
has few: nine heads over two threads are five and four, and each reads the keys of its group anew. Here the
queries of a group are rows of one product, and parts of the context are a batch: a layer of 16 sequences of
1,060 tokens takes 0.85 of the time (docs/devlog.md). Below some 500 tokens joining costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

__all__ = ["SPLIT_TOKENS_MIN", "SplitRun"]

SPLIT_TOKENS_MIN: Final = 512
PART_TOKENS: Final = 256

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class _Parts:
    """`count` parts of `tokens` each, one behind the other from row `begin` of the pool on."""

    sequence: int
    begin: int
    count: int
    tokens: int


class SplitRun:
    """One new token each of sequences whose tokens lie adjacent, in rows `where` of the pool. Plans what does
    not depend on the layer."""

    def __init__(self, where: Sequence[slice]) -> None:
        self._parts = [parts for index, rows in enumerate(where) for parts in _parts(index, rows)]
        numbers: list[list[int]] = [[] for _ in where]
        total = 0
        for parts in self._parts:
            numbers[parts.sequence] += range(total, total + parts.count)
            total += parts.count
        most = max(map(len, numbers))
        self._table = torch.tensor([own + [total] * (most - len(own)) for own in numbers])

    def attend(self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """`keys` and `values` [tokens, kv_heads, head_dim] are one layer's; of `queries` [sequences, heads,
        head_dim] the answers."""
        sequences, heads, head_dim = queries.shape
        grouped = torch.split(queries.view(sequences, keys.shape[1], -1, head_dim), 1)
        outputs, sums = [], []
        for parts in self._parts:
            query = grouped[parts.sequence].expand(parts.count, -1, -1, -1)
            output, log_sum = _attention(query, _strided(keys, parts), _strided(values, parts))
            outputs.append(output)
            sums.append(log_sum)
        nothing = outputs[0][:1]
        of_each = torch.cat((*outputs, nothing))[self._table].float()
        log_sums = torch.cat((*sums, torch.full_like(sums[0][:1], -torch.inf)))[self._table]
        joined = (of_each * log_sums.softmax(1).unsqueeze(-1)).sum(1)
        return joined.to(queries.dtype).view(sequences, heads, head_dim)


def _parts(sequence: int, rows: slice) -> list[_Parts]:
    tokens = rows.stop - rows.start
    whole, rest = divmod(tokens, PART_TOKENS)
    found = [_Parts(sequence, rows.start, whole, PART_TOKENS)] if whole else []
    return [*found, _Parts(sequence, rows.stop - rest, 1, rest)] if rest else found


def _strided(side: torch.Tensor, parts: _Parts) -> torch.Tensor:
    """View [parts, kv_heads, tokens, head_dim]."""
    row, head, dim = side.stride()
    shape = (parts.count, side.shape[1], parts.tokens, side.shape[2])
    begin = side.storage_offset() + parts.begin * row
    return side.as_strided(shape, (parts.tokens * row, head, row, dim), begin)
