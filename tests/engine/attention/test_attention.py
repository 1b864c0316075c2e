"""Promise: both ways to attend compute softmax(q k^T / sqrt(d)) v, causally, over whatever slots hold."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from engine.attention.base import AttentionBackend, Segment
from engine.attention.fixed_split import FixedSplitAttention, check_attention_invariance
from engine.attention.sdpa import SdpaAttention
from engine.pool import KVPool
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 16, 32
LAYOUT = KVLayout(2, 0, KV_HEADS, HEAD_DIM, "float32", BLOCK)


def naive(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """float64, query by query, head by head."""
    out = torch.empty_like(queries, dtype=torch.float64)
    for row, head in itertools.product(range(queries.shape[0]), range(HEADS)):
        kv_head = head // (HEADS // KV_HEADS)
        seen_keys, seen_values = keys[: start + row + 1, kv_head], values[: start + row + 1, kv_head]
        scores = seen_keys.double() @ queries[row, head].double() / HEAD_DIM**0.5
        out[row, head] = scores.softmax(0) @ seen_values.double()
    return out.float()


@pytest.fixture
def pool() -> KVPool:
    """Every byte of it random, the last layer's kept apart from the first's."""
    generator = torch.Generator().manual_seed(0)
    made = KVPool(LAYOUT, 64)
    for layer in range(2):
        made.keys(layer).copy_(torch.randn(made.keys(layer).shape, generator=generator))
        made.values(layer).copy_(torch.randn(made.values(layer).shape, generator=generator))
    return made


def of_sequence(pool: KVPool, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [segment.slots[p // BLOCK] * BLOCK + p % BLOCK for p in range(segment.context)]
    return pool.keys(1)[rows], pool.values(1)[rows]


@pytest.mark.parametrize("backend", [FixedSplitAttention(HEADS), SdpaAttention()])
def test_segments_of_all_kinds_in_one_step(backend: AttentionBackend, pool: KVPool) -> None:
    scattered = tuple(range(63, 30, -2))
    segments = [
        Segment(0, 1, 0, (5,)),
        Segment(1, 1, 255, tuple(range(10, 18))),
        Segment(2, 1, 256, tuple(range(10, 19))),
        Segment(3, 1, 300, scattered),
        Segment(4, 150, 200, scattered),
        Segment(154, 40, 0, (20, 21)),
        Segment(194, 10, 250, tuple(range(20, 30))),
    ]
    queries = torch.randn(204 + 4, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    out = torch.full_like(queries, 7.0)
    backend.plan(segments, pool).attend(1, queries, out)
    for segment in segments:
        rows = slice(segment.row, segment.row + segment.rows)
        expected = naive(queries[rows], *of_sequence(pool, segment), segment.start)
        torch.testing.assert_close(out[rows], expected, rtol=1e-5, atol=1e-5)
    assert (out[204:] == 7.0).all(), "padding rows are not touched"


@pytest.mark.parametrize("block_tokens", [16, 48, 300])
def test_tiles_are_whole_blocks_of_any_size(block_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = KVLayout(1, 0, KV_HEADS, HEAD_DIM, "float32", block_tokens)
    pool = KVPool(layout, 700 // block_tokens + 1)
    pool.keys(0).copy_(torch.randn(pool.keys(0).shape, generator=generator))
    pool.values(0).copy_(torch.randn(pool.values(0).shape, generator=generator))
    segment = Segment(0, 5, 600, tuple(range(pool.n_slots)))
    queries = torch.randn(5, HEADS, HEAD_DIM, generator=generator)
    out = torch.empty_like(queries)
    FixedSplitAttention(HEADS).plan([segment], pool).attend(0, queries, out)
    expected = naive(queries, pool.keys(0), pool.values(0), 600)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_machine_where_attention_varies_is_refused(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    check_attention_invariance(HEADS, layout)
    bmm = torch.bmm

    def by_row_count(
        left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        product: torch.Tensor = bmm(left, right) * (1 + 0.02 * (left.shape[1] == 4))
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "bmm", by_row_count)
    with pytest.raises(ConfigError, match="attention to one position gives other bits"):
        check_attention_invariance(HEADS, layout)
