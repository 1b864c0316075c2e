"""One new token a sequence: the tiles of many sequences computed together, with the bits of fixed_split.py.

A decode step has few rows and much context, so its cost is in how many operations it takes, each of which
wakes every thread. Here they are as many for sixteen sequences as for one. The tiles lie position first:

    sequences, longest first      a: 3 tiles   b: 2   c: 1
    tiles                         a0 b0 c0 | a1 b1 | a2

so that what one position adds to the sums of those that reach it is one slice after another. Measured at 16
sequences of 300 tokens, 30 layers: a whole step of 392 ms became 218 (docs/devlog.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from engine.attention.base import Segment
from engine.pool import KVPool

__all__ = ["ROWS_MULTIPLE", "DecodeGroup", "decode_groups", "padded_rows"]

_LOG2_E: Final = math.log2(math.e)
ROWS_MULTIPLE: Final = 4
"""Counts of query rows for which MKL gives a row the same bits in any company."""
_TILES_MAX: Final = 64
"""Tiles gathered at once (25 MB for SmolLM2), but for one sequence that has more."""


def decode_groups(segments: Sequence[Segment], pool: KVPool, heads: int, width: int) -> Iterator[DecodeGroup]:
    """The segments of one row each, in groups that bound memory."""
    longest_first = sorted(segments, key=lambda segment: -segment.context)
    group: list[Segment] = []
    tiles = 0
    for segment in longest_first:
        more = -(-segment.context // width)
        if group and tiles + more > _TILES_MAX:
            yield DecodeGroup(group, pool, heads, width)
            group, tiles = [], 0
        group.append(segment)
        tiles += more
    if group:
        yield DecodeGroup(group, pool, heads, width)


class DecodeGroup:
    """What of a step's plan does not depend on the layer, and the scratch memory of all layers."""

    def __init__(self, segments: Sequence[Segment], pool: KVPool, heads: int, width: int) -> None:
        layout = pool.layout
        self._pool = pool
        self._width = width
        self._group = heads // layout.kv_heads
        self._padded = padded_rows(self._group)
        self._rows = torch.tensor([segment.row for segment in segments])
        tiles_of = [-(-segment.context // width) for segment in segments]
        self._reached = [sum(tiles > position for tiles in tiles_of) for position in range(tiles_of[0])]
        self._sequence = torch.cat([torch.arange(reached) for reached in self._reached])
        self._where, hidden = _gather_index(segments, self._reached, pool, width)
        self._hidden = hidden.view(-1, 1, 1, width)
        shape = (len(self._sequence), layout.kv_heads, width)
        self._hidden_rows = hidden.unsqueeze(1).expand(shape).flatten().nonzero().flatten()
        self._gathered = torch.empty(2, math.prod(shape), layout.head_dim, dtype=pool.keys(0).dtype)

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        keys = self._gather(self._pool.keys(layer), self._gathered[0])
        values = self._gather(self._pool.values(layer), self._gathered[1])
        # Behind the last token may lie anything, NaN included; its weight is zero, and so must it be.
        values.index_fill_(0, self._hidden_rows, 0)
        query = self._group_queries(queries)[self._sequence]
        tiles, kv_heads, rows, head_dim = query.shape
        as_tiles = (tiles * kv_heads, self._width, head_dim)
        scores = torch.bmm(query.flatten(0, 1), keys.view(as_tiles).transpose(1, 2))
        weights = scores.view(tiles, kv_heads, rows, self._width).masked_fill_(self._hidden, -math.inf)
        highest = self._by_sequence(weights.amax(-1), torch.maximum)
        weights.sub_(highest[self._sequence].unsqueeze(-1)).exp2_()
        total = self._by_sequence(weights.sum(-1), torch.add)
        products = torch.bmm(weights.flatten(0, 1), values.view(as_tiles)).view(query.shape)
        result = self._by_sequence(products, torch.add).div_(total.unsqueeze(-1))
        out[self._rows] = result[:, :, : self._group].reshape(-1, *out.shape[1:]).to(out.dtype)

    def _gather(self, flat: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """float32 [tiles * kv_heads * width, head_dim]."""
        rows = flat.view(-1, flat.shape[-1])
        return torch.index_select(rows, 0, self._where, out=scratch).float()

    def _group_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """float32 [sequences, kv_heads, padded, head_dim], scaled: a KV head's queries as rows."""
        taken = queries[self._rows]
        grouped = taken.view(len(taken), -1, self._group, taken.shape[-1]).float()
        filled = torch.nn.functional.pad(grouped, (0, 0, 0, self._padded - self._group))
        return filled.mul_(_LOG2_E * taken.shape[-1] ** -0.5)

    def _by_sequence(self, tiles: torch.Tensor, combine: Callable[..., Any]) -> torch.Tensor:
        """[tiles, ...] -> [sequences, ...], combined in the order of positions."""
        first, *later = torch.split(tiles, self._reached)
        combined = first.clone()
        for tile in later:
            reached = combined[: len(tile)]
            combine(reached, tile, out=reached)
        return combined


def padded_rows(rows: int) -> int:
    return -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE


def _gather_index(
    segments: Sequence[Segment], reached: Sequence[int], pool: KVPool, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the pool seen as [tokens * kv_heads, head_dim], for [tiles, kv_heads, width]; and which
    places of [tiles, width] lie behind the last token (they hold some row of the pool)."""
    block_tokens, kv_heads = pool.layout.block_tokens, pool.layout.kv_heads
    blocks_a_tile = width // block_tokens
    slots = torch.zeros(len(segments), len(reached) * blocks_a_tile, dtype=torch.int64)
    for index, segment in enumerate(segments):
        taken = segment.slots[: -(-segment.context // block_tokens)]
        slots[index, : len(taken)] = torch.tensor(taken)
    tokens = (slots.unsqueeze(2) * block_tokens + torch.arange(block_tokens)).flatten(1)
    contexts = torch.tensor([segment.context for segment in segments]).unsqueeze(1)
    behind = torch.arange(len(reached) * width) >= contexts
    at = [slice(position * width, (position + 1) * width) for position in range(len(reached))]
    rows = torch.cat([tokens[:count, where] for count, where in zip(reached, at, strict=True)])
    hidden = torch.cat([behind[:count, where] for count, where in zip(reached, at, strict=True)])
    by_head = rows.unsqueeze(1) * kv_heads + torch.arange(kv_heads).unsqueeze(1)
    return by_head.flatten(), hidden
