"""Batch-invariant attention: the context is cut at fixed absolute positions, whatever the chunk.

A query's result must not depend, to the bit, on how many queries come with it, on which other sequences
are in the step, on how the prompt was chunked, or on how much room stands behind it. So:

    context   0        256       512    600        tiles of 256 tokens at absolute positions
              [ tile 0 ][ tile 1 ][ tile 2 ....]   the last one padded with zeros to its full width
    queries   [ up to 128 positions x heads of the group, padded to 4 rows ]

    scores_t  = q k_t^T           one product of fixed shape a tile, masked to -inf after the query
    m         = max over all      exact in any order
    p_t       = 2 ** (scores_t - m)      scores carry a factor log2(e): exp2 costs half of exp
    l         = ((sum p_0 + sum p_1) + sum p_2) ...      in the order of positions
    o         = ((p_0 v_0 + p_1 v_1) + p_2 v_2) ... / l

A tile wholly behind a query, or wholly out of its window, adds exact zeros, so it does not matter whether it
is computed or skipped: a windowed layer reads the tiles that some row of the block sees, and no others.
Row counts are those for which MKL gives a row the same bits in any company: multiples of 4. Scores, sums
and products are float32 whatever the pool's dtype. Sequences with one new token are computed together, in
the same order of additions (fixed_split_decode.py). Source of the idea: fixed split-KV (Flash-Decoding, and
He et al. 2025, "Defeating nondeterminism in LLM inference").

Full tiles whose slots are adjacent in the pool are read in place, others are gathered: reading in place
saves a copy of the whole context a layer. Time against torch's own kernel: docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from engine.attention.base import Segment, Windows, hidden_tokens
from engine.attention.fixed_split_decode import DecodeGroup, decode_groups, padded_rows, seen_tiles
from engine.linear import variant
from engine.pool import KVPool
from kvstore.nouns import KVLayout

__all__ = ["FixedSplitAttention", "check_attention_invariance", "tile_width"]

_LOG2_E: Final = math.log2(math.e)
TILE_TOKENS: Final = 256
QUERY_BLOCK: Final = 128
"""Positions whose scores are held at once: bounds memory to heads * 128 * context floats."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Where a tile's tokens lie in the pool (a slice when adjacent), and how many they are."""

    tokens: int
    where: torch.Tensor | slice


@dataclass(frozen=True, slots=True)
class _QueryBlock:
    """Rows of the step that are computed together, over the `tiles` that one of them sees."""

    row: int
    rows: int
    padded: int  # rows * group, padded
    tiles: tuple[int, ...]
    masks: tuple[tuple[int, torch.Tensor], ...]  # (index in `tiles`, bool [padded, width]: not visible)


@dataclass(frozen=True, slots=True)
class _SegmentPlan:
    tiles: Mapping[int, _Tile]  # by number: tile n begins at token n * width
    blocks: tuple[_QueryBlock, ...]


class FixedSplitAttention:
    """See the module. `heads` is the model's; KV heads and head_dim are the pool's."""

    def __init__(self, heads: int, windows: Windows, sinks: int = 0) -> None:
        self._heads = heads
        self._windows = windows
        self._sinks = sinks

    def plan(self, segments: Sequence[Segment], pool: KVPool) -> FixedSplitPlan:
        plans = {window: self._plan(segments, pool, window) for window in set(self._windows)}
        return FixedSplitPlan([plans[window] for window in self._windows])

    def _plan(self, segments: Sequence[Segment], pool: KVPool, window: int | None) -> _WindowPlan:
        width = tile_width(pool.layout.block_tokens)
        group = self._heads // pool.layout.kv_heads
        visibility = (window, self._sinks)
        chunks = [
            _SegmentPlan(
                _tiles(segment, pool, width, *visibility),
                tuple(_query_blocks(segment, group, width, *visibility)),
            )
            for segment in segments
            if segment.rows > 1
        ]
        single = [segment for segment in segments if segment.rows == 1]
        decoding = list(decode_groups(single, pool, self._heads, width, *visibility))
        return _WindowPlan(chunks, decoding, pool, group, width)


def check_attention_invariance(heads: int, layout: KVLayout, windowed: bool) -> None:
    """Prove on this machine, with its threads, that a position's result does not depend on what it is
    computed with: alone, among other sequences, in a chunk. `windowed`: behind a window too, whose length
    does not matter. A few milliseconds. Raises ConfigError."""
    width = tile_width(layout.block_tokens)
    _check_invariance(heads, layout, width, None)
    if windowed:
        _check_invariance(heads, layout, width, width + 5)


def _check_invariance(heads: int, layout: KVLayout, width: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    # The chunk crosses a tile's end and a query block's, the window's first token a tile's end.
    first, rows = 2 * width - 9, QUERY_BLOCK + 2
    slots = tuple(range(-(-(first + rows) // layout.block_tokens)))
    pool = KVPool(replace(layout, layers=1), len(slots))
    for kept in (pool.keys(0), pool.values(0)):
        kept.copy_(torch.randn(kept.shape, generator=generator))
    queries = torch.randn(rows, heads, layout.head_dim, generator=generator).to(pool.keys(0).dtype)
    backend = FixedSplitAttention(heads, (window,))
    whole, apart = torch.empty_like(queries), torch.empty_like(queries)
    backend.plan([Segment(0, rows, first, slots)], pool).attend(0, queries, whole)
    singles = [Segment(row, 1, first + row, slots) for row in range(rows)]
    for together in (singles[:1], singles[1:18], singles[18:-5]):
        backend.plan(together, pool).attend(0, queries, apart)
    backend.plan([Segment(rows - 5, 5, first + rows - 5, slots)], pool).attend(0, queries, apart)
    if not torch.equal(whole, apart):
        raise variant("attention to one position")


class FixedSplitPlan:
    """Of every layer the plan of its window."""

    def __init__(self, plans: list[_WindowPlan]) -> None:
        self._plans = plans

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        self._plans[layer].attend(layer, queries, out)


class _WindowPlan:
    """Holds the step's scratch memory too: fresh pages for every layer cost more than the products."""

    def __init__(
        self, plans: list[_SegmentPlan], decoding: list[DecodeGroup], pool: KVPool, group: int, width: int
    ) -> None:
        self._plans = plans
        self._decoding = decoding
        self._pool = pool
        self._group = group
        self._width = width
        kv_heads, head_dim = pool.layout.kv_heads, pool.layout.head_dim
        scores = max((len(block.tiles) * block.padded for plan in plans for block in plan.blocks), default=0)
        self._weights = torch.empty(scores * kv_heads * width)
        dtype = pool.keys(0).dtype
        # A zero behind every sequence's last token; rows before it are overwritten layer by layer.
        self._last_tiles = torch.zeros(len(plans), 2, width, kv_heads, head_dim, dtype=dtype)

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        for group in self._decoding:
            group.attend(layer, queries, out)
        flat_keys, flat_values = self._pool.keys(layer), self._pool.values(layer)
        for plan, (last_keys, last_values) in zip(self._plans, self._last_tiles, strict=True):
            keys = {n: self._load(tile, flat_keys, last_keys) for n, tile in plan.tiles.items()}
            values = {n: self._load(tile, flat_values, last_values) for n, tile in plan.tiles.items()}
            for block in plan.blocks:
                self._attend_block(block, queries, keys, values, out)

    def _load(self, tile: _Tile, flat: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """float32 [kv_heads, tile, head_dim]: a view of the pool where that is possible."""
        tokens = flat[tile.where]
        if tile.tokens < self._width:
            # Fixed shape. Not the pool's own bytes: behind the last token may lie anything, NaN included.
            last[: tile.tokens] = tokens
            tokens = last
        return tokens.permute(1, 0, 2).float()

    def _attend_block(
        self,
        block: _QueryBlock,
        queries: torch.Tensor,
        keys: Mapping[int, torch.Tensor],
        values: Mapping[int, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        query = self._group_queries(block, queries)
        shape = (len(block.tiles), query.shape[0], block.padded, self._width)
        weights = self._weights[: math.prod(shape)].view(shape)
        for index, tile in enumerate(block.tiles):
            torch.bmm(query, keys[tile].transpose(1, 2), out=weights[index])
        for index, hidden in block.masks:
            weights[index].masked_fill_(hidden, -math.inf)
        highest = weights.amax(-1).amax(0)
        weights.sub_(highest.unsqueeze(-1)).exp2_()
        sums = weights.sum(-1)
        total = sums[0]
        result = torch.bmm(weights[0], values[block.tiles[0]])
        for index, tile in enumerate(block.tiles[1:], 1):
            total = total + sums[index]
            result += torch.bmm(weights[index], values[tile])
        result.div_(total.unsqueeze(-1))
        self._ungroup(block, result, out)

    def _group_queries(self, block: _QueryBlock, queries: torch.Tensor) -> torch.Tensor:
        """float32 [kv_heads, padded, head_dim], scaled: a KV head's queries as rows, padded with zeros."""
        head_dim = queries.shape[-1]
        taken = queries[block.row : block.row + block.rows]
        grouped = taken.view(block.rows, -1, self._group, head_dim).permute(1, 0, 2, 3)
        rows = grouped.reshape(grouped.shape[0], -1, head_dim).float()
        padded = rows.new_zeros(rows.shape[0], block.padded, head_dim)
        padded[:, : rows.shape[1]] = rows
        return padded.mul_(_LOG2_E * head_dim**-0.5)

    def _ungroup(self, block: _QueryBlock, result: torch.Tensor, out: torch.Tensor) -> None:
        head_dim = result.shape[-1]
        rows = result[:, : block.rows * self._group]
        by_position = rows.view(-1, block.rows, self._group, head_dim).permute(1, 0, 2, 3)
        out[block.row : block.row + block.rows].view(by_position.shape).copy_(by_position)


def tile_width(block_tokens: int) -> int:
    """Whole blocks, as near to TILE_TOKENS as they come."""
    return block_tokens * max(1, TILE_TOKENS // block_tokens)


def _tiles(segment: Segment, pool: KVPool, width: int, window: int | None, sinks: int) -> dict[int, _Tile]:
    tiles = {}
    for tile in seen_tiles(segment, width, window, sinks):
        begin, end = tile * width, min((tile + 1) * width, segment.context)
        tiles[tile] = _Tile(end - begin, pool.token_index(segment.slots, begin, end))
    return tiles


def _query_blocks(
    segment: Segment, group: int, width: int, window: int | None, sinks: int
) -> Iterator[_QueryBlock]:
    for offset in range(0, segment.rows, QUERY_BLOCK):
        rows = min(QUERY_BLOCK, segment.rows - offset)
        block = Segment(segment.row + offset, rows, segment.start + offset, segment.slots)
        padded = padded_rows(rows * group)
        tiles = seen_tiles(block, width, window, sinks)
        masks = tuple(_masks(block, group, padded, width, tiles, window, sinks))
        yield _QueryBlock(block.row, rows, padded, tiles, masks)


def _masks(
    block: Segment,
    group: int,
    padded: int,
    width: int,
    tiles: tuple[int, ...],
    window: int | None,
    sinks: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """For each tile that not every row sees whole: which of its tokens a row does not see."""
    # Padding rows take the last row's position: what they compute is finite and never read.
    last = block.context - 1
    positions = (block.start + torch.arange(padded) // group).clamp_(max=last).unsqueeze(1)
    for index, tile in enumerate(tiles):
        begin, end = tile * width, (tile + 1) * width
        in_every_window = window is None or begin > last - window or end <= sinks
        if end - 1 > block.start or not in_every_window:
            yield index, hidden_tokens(positions, torch.arange(begin, end), window, sinks)
