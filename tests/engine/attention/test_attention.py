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


def naive(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    window: int | None = None,
    sinks: int = 0,
) -> torch.Tensor:
    """float64, query by query, head by head."""
    out = torch.empty_like(queries, dtype=torch.float64)
    for row, head in itertools.product(range(queries.shape[0]), range(HEADS)):
        kv_head, position = head // (HEADS // KV_HEADS), start + row
        seen = [t for t in range(position + 1) if window is None or t < sinks or position - t < window]
        seen_keys, seen_values = keys[seen, kv_head], values[seen, kv_head]
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


def of_sequence(pool: KVPool, layer: int, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [segment.slots[p // BLOCK] * BLOCK + p % BLOCK for p in range(segment.context)]
    return pool.keys(layer)[rows], pool.values(layer)[rows]


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (40, 0), (40, 3), (256, 0), (300, 290)])
@pytest.mark.parametrize("invariant", [True, False])
def test_segments_of_all_kinds_in_one_step(
    invariant: bool, window: int | None, sinks: int, pool: KVPool
) -> None:
    """The first layer sees everything, the second one its window."""
    windows = (None, window)
    backend: AttentionBackend = (
        FixedSplitAttention(HEADS, windows, sinks) if invariant else SdpaAttention(windows, sinks)
    )
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
    for layer, its in enumerate(windows):
        out = torch.full_like(queries, 7.0)
        backend.plan(segments, pool).attend(layer, queries, out)
        for segment in segments:
            rows = slice(segment.row, segment.row + segment.rows)
            kept = of_sequence(pool, layer, segment)
            expected = naive(queries[rows], *kept, segment.start, its, sinks)
            torch.testing.assert_close(out[rows], expected, rtol=1e-5, atol=1e-5)
        assert (out[204:] == 7.0).all(), "padding rows are not touched"


@pytest.mark.parametrize("window", [None, 700])
def test_long_contexts_in_parts(window: int | None, pool: KVPool) -> None:
    """Whole parts, parts and a rest, and short ones in their company; what lies beyond is not read."""
    begins = (0, 17, 34, 35, 40)
    ends = (511, 512, 1, 130, 767)
    segments = [
        Segment(row, 1, end, tuple(range(begin, begin + end // BLOCK + 1)))
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    segments.append(Segment(5, 1, 600, tuple(range(60, 40, -1))[:19]))  # not adjacent: alone in its run
    queries = torch.randn(6, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    for rows in (slice(0, 5), slice(0, 6)):
        out = torch.empty_like(queries[rows])
        SdpaAttention((window, window)).plan(segments[rows], pool).attend(1, queries[rows], out)
        for segment, found in zip(segments[rows], out, strict=True):
            kept = of_sequence(pool, 1, segment)
            query = queries[segment.row : segment.row + 1]
            expected = naive(query, *kept, segment.start, window)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 20])
@pytest.mark.parametrize("invariant", [True, False])
def test_blocks_out_of_the_window_are_not_read(invariant: bool, sinks: int, pool: KVPool) -> None:
    """Whatever lies there, NaN included, reaches nothing."""
    backend: AttentionBackend = (
        FixedSplitAttention(HEADS, (64, 64), sinks) if invariant else SdpaAttention((64, 64), sinks)
    )
    slots = tuple(range(40))
    segments = [Segment(0, 9, 1000, slots), Segment(9, 1, 1100, slots)]
    queries = torch.randn(10, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    clean, poisoned = torch.empty_like(queries), torch.empty_like(queries)
    backend.plan(segments, pool).attend(1, queries, clean)
    for kept in (pool.keys(1), pool.values(1)):
        kept[256:768] = float("nan")
    backend.plan(segments, pool).attend(1, queries, poisoned)
    assert torch.equal(clean, poisoned)


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
    FixedSplitAttention(HEADS, (None,)).plan([segment], pool).attend(0, queries, out)
    expected = naive(queries, pool.keys(0), pool.values(0), 600)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_machine_where_attention_varies_is_refused(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    check_attention_invariance(HEADS, layout, windowed=True)
    bmm = torch.bmm

    def by_row_count(
        left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        product: torch.Tensor = bmm(left, right) * (1 + 0.02 * (left.shape[1] == 4))
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "bmm", by_row_count)
    with pytest.raises(ConfigError, match="attention to one position gives other bits"):
        check_attention_invariance(HEADS, layout, windowed=True)
