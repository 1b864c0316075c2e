"""One new token a sequence: the tiles of many sequences computed together, with the bits of fixed_split.py.

A decode step has few rows and much context, so its cost is in how many operations it takes, each of which
wakes every thread. Here they are as many for sixteen sequences as for one. The tiles lie position first:

    sequences, longest first      a: 3 tiles   b: 2   c: 1
    tiles                         a0 b0 c0 | a1 b1 | a2

so that what one position adds to the sums of those that reach it is one slice after another. Measured at 16
sequences of 300 tokens, 30 layers: a whole step of 392 ms became 218 (docs/devlog.md). Of a windowed layer a
sequence has the tiles it sees, and they are its first, second, third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from engine.attention.base import Segment, hidden_tokens, visible_ranges
from engine.pool import KVPool

__all__ = ["ROWS_MULTIPLE", "DecodeGroup", "decode_groups", "padded_rows", "seen_tiles"]

_LOG2_E: Final = math.log2(math.e)
ROWS_MULTIPLE: Final = 4
"""Counts of query rows for which MKL gives a row the same bits in any company."""
_TILES_MAX: Final = 64
"""Tiles gathered at once (25 MB for SmolLM2), but for one sequence that has more."""


def seen_tiles(segment: Segment, width: int, window: int | None, sinks: int) -> tuple[int, ...]:
    """Numbers of the tiles that any row of the segment sees something of, in order."""
    ranges = visible_ranges(segment, window, sinks)
    return tuple(
        sorted({tile for seen in ranges for tile in range(seen.start // width, -(-seen.stop // width))})
    )


def decode_groups(
    segments: Sequence[Segment], pool: KVPool, heads: int, width: int, window: int | None, sinks: int
) -> Iterator[DecodeGroup]:
    """The segments of one row each, in groups that bound memory."""
    seen = [(segment, seen_tiles(segment, width, window, sinks)) for segment in segments]
    group: list[tuple[Segment, tuple[int, ...]]] = []
    tiles = 0
    for segment, its in sorted(seen, key=lambda one: -len(one[1])):
        if group and tiles + len(its) > _TILES_MAX:
            yield DecodeGroup(group, pool, heads, width, window, sinks)
            group, tiles = [], 0
        group.append((segment, its))
        tiles += len(its)
    if group:
        yield DecodeGroup(group, pool, heads, width, window, sinks)


class DecodeGroup:
    """What of a step's plan does not depend on the layer, and the scratch memory of all layers."""

    def __init__(
        self,
        seen: Sequence[tuple[Segment, tuple[int, ...]]],
        pool: KVPool,
        heads: int,
        width: int,
        window: int | None,
        sinks: int,
    ) -> None:
        """`seen`: of each sequence its one row and its tiles, most tiles first."""
        layout = pool.layout
        self._pool = pool
        self._width = width
        self._group = heads // layout.kv_heads
        self._padded = padded_rows(self._group)
        self._rows = torch.tensor([segment.row for segment, _ in seen])
        most = len(seen[0][1])
        self._reached = [sum(len(tiles) > index for _, tiles in seen) for index in range(most)]
        self._sequence = torch.cat([torch.arange(reached) for reached in self._reached])
        self._where, hidden = _gather_index(seen, self._reached, pool, width, window, sinks)
        self._hidden = hidden.view(-1, 1, 1, width)
        shape = (len(self._sequence), layout.kv_heads, width)
        self._hidden_rows = hidden.unsqueeze(1).expand(shape).flatten().nonzero().flatten()
        self._gathered = torch.empty(2, math.prod(shape), layout.head_dim, dtype=pool.keys(0).dtype)

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        keys = self._gather(self._pool.keys(layer), self._gathered[0])
        values = self._gather(self._pool.values(layer), self._gathered[1])
        # In hidden places may lie anything, NaN included; its weight is zero, and so must it be.
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
    seen: Sequence[tuple[Segment, tuple[int, ...]]],
    reached: Sequence[int],
    pool: KVPool,
    width: int,
    window: int | None,
    sinks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the pool seen as [tokens * kv_heads, head_dim], for [tiles, kv_heads, width]; and which
    places of [tiles, width] their sequence does not see (they hold some row of the pool)."""
    block_tokens, kv_heads = pool.layout.block_tokens, pool.layout.kv_heads
    blocks_a_tile = width // block_tokens
    room = len(reached) * blocks_a_tile
    slots, begins = [], []
    for segment, tiles in seen:
        known = segment.slots[: -(-segment.context // block_tokens)]
        taken = [s for tile in tiles for s in known[tile * blocks_a_tile : (tile + 1) * blocks_a_tile]]
        slots.append(taken + [0] * (room - len(taken)))
        begins.append([tile * width for tile in tiles] + [0] * (len(reached) - len(tiles)))
    blocks = torch.tensor(slots).view(len(seen), len(reached), blocks_a_tile, 1)
    tokens = (blocks * block_tokens + torch.arange(block_tokens)).flatten(2)
    positions = torch.tensor(begins).unsqueeze(2) + torch.arange(width)
    queries = torch.tensor([segment.start for segment, _ in seen]).view(-1, 1, 1)
    hidden = hidden_tokens(queries, positions, window, sinks)
    rows = torch.cat([tokens[:count, index] for index, count in enumerate(reached)])
    unseen = torch.cat([hidden[:count, index] for index, count in enumerate(reached)])
    by_head = rows.unsqueeze(1) * kv_heads + torch.arange(kv_heads).unsqueeze(1)
    return by_head.flatten(), unseen
