"""What benchmarks/gpu.py measures of attention: bandwidth of decode, gather and scatter, speed of prefill.

Bytes are those that must move: of decode the keys and values of every context once (codes and scales of a
quantised pool), of copies each byte read and each written. A share is of the copy bandwidth of the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from engine.attention.base import AttentionPlan, Segment
from engine.attention.reference import ReferenceAttention
from engine.attention.triton_attention import TritonAttention
from engine.attention.triton_copy import gather, scatter
from engine.attention.triton_tuning import Tuning
from engine.pool import KVPool
from engine.quantised_pool import QuantisedPool
from kvstore.nouns import KVLayout

__all__ = ["TINY", "Row", "Sizes", "checked", "measured", "swept"]

HOT: Final = ("model", "fp8", "int8")


class Row(NamedTuple):
    """`share` is of `of`, measured in the same call; 1 is as fast. Seconds are of one run."""

    name: str
    median_s: float
    min_s: float
    max_s: float
    gb_s: float | None = None
    tflop_s: float | None = None
    share: float | None = None
    of: str = ""
    goal: float | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Llama 3 8B's shape; `layers` are of the copies' pool, attention has one."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_tokens: int = 32
    dtype: str = "bfloat16"
    batch: int = 64
    context: int = 8192
    chunk: int = 2048
    layers: int = 32
    copied_blocks: int = 256
    copy_nbytes: int = 2 << 30
    rounds: int = 30
    tuning: Tuning | None = None

    def layout(self, layers: int = 1) -> KVLayout:
        return KVLayout(layers, 0, self.kv_heads, self.head_dim, self.dtype, self.block_tokens)


TINY: Final = Sizes(
    heads=4, kv_heads=2, head_dim=32, block_tokens=16, dtype="float32", batch=2, context=64, chunk=24,
    layers=2, copied_blocks=3, copy_nbytes=1 << 20, rounds=2,
    tuning=Tuning(16, 4, 1, 16, 16, 4, 1, split_tokens=32),
)  # fmt: skip
"""For Triton's interpreter: it shows that everything runs, and nothing about speed."""


class DevicePool(KVPool):
    """KV in the dtype of the model, in a device's memory."""

    def __init__(self, layout: KVLayout, n_slots: int, device: torch.device) -> None:
        self.layout = layout
        self.n_slots = n_slots
        shape = (layout.layers, 2, n_slots * layout.block_tokens, layout.kv_heads, layout.head_dim)
        self._flat = torch.empty(shape, dtype=getattr(torch, layout.dtype), device=device)


def pool_of(layout: KVLayout, slots: int, hot: str, device: torch.device) -> KVPool:
    """Filled with random numbers, a piece at a time."""
    pool = DevicePool(layout, slots, device) if hot == "model" else QuantisedPool(layout, slots, hot, device)
    for layer in range(layout.layers):
        for rows in torch.split(torch.arange(slots * layout.block_tokens, device=device), 1 << 16):
            keys, values = torch.randn(
                2, len(rows), layout.kv_heads, layout.head_dim, dtype=pool.dtype, device=device
            )
            pool.write(layer, rows, keys, values)
    return pool


def times(work: Callable[[], object], rounds: int, device: torch.device) -> list[float]:
    """Seconds of each round. On CUDA by events, after two rounds that compile and warm up; the caches are
    as the round before left them: what is measured is far larger than they are."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        return [_host_seconds(work) for _ in range(rounds)]
    marks = [(_mark(), _mark()) for _ in range(rounds)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Bench:
    """One run: the copy bandwidth first, then shares of it."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes = sizes
        self.device = device
        self.copy_gb_s = 0.0

    def moved(self, name: str, nbytes: int, work: Callable[[], object], goal: float | None) -> Row:
        seconds = times(work, self.sizes.rounds, self.device)
        gb_s = nbytes / statistics.median(seconds) / 1e9
        share = gb_s / self.copy_gb_s if self.copy_gb_s else None
        of = "copy" if share is not None else ""
        return Row(name, *_spread(seconds), gb_s=gb_s, share=share, of=of, goal=goal)

    def copy(self) -> Row:
        source = torch.ones(self.sizes.copy_nbytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        row = self.moved("copy", 2 * source.nbytes, lambda: target.copy_(source), None)
        assert row.gb_s is not None
        self.copy_gb_s = row.gb_s
        return row

    def backend(self, *, invariant: bool = False, window: int | None = None) -> TritonAttention:
        sizes = self.sizes
        sinks = 4 if window else 0
        return TritonAttention(sizes.heads, (window,), sinks, batch_invariant=invariant, tuning=sizes.tuning)

    def queries(self, rows: int, pool: KVPool) -> torch.Tensor:
        return torch.randn(rows, self.sizes.heads, self.sizes.head_dim, dtype=pool.dtype, device=self.device)

    def decoding(self) -> tuple[list[Segment], int]:
        """Every sequence at the same context, its blocks anywhere; the slots of all."""
        sizes, blocks = self.sizes, -(-self.sizes.context // self.sizes.block_tokens)
        slots = torch.randperm(sizes.batch * blocks).tolist()
        segments = [
            Segment(i, 1, sizes.context - 1, tuple(slots[i * blocks : (i + 1) * blocks]))
            for i in range(sizes.batch)
        ]
        return segments, len(slots)

    def decode(self, hot: str) -> Iterator[Row]:
        segments, slots = self.decoding()
        pool = pool_of(self.sizes.layout(), slots, hot, self.device)
        queries = self.queries(len(segments), pool)
        out = torch.empty_like(queries)
        plan = self.backend().plan(segments, pool)
        nbytes = self.context_nbytes(pool)
        yield self.moved(f"decode {hot}", nbytes, lambda: plan.attend(0, queries, out), 0.8)
        if hot == "model":
            yield from self._decode_otherwise(segments, pool, queries, nbytes)

    def context_nbytes(self, pool: KVPool) -> int:
        """Of the keys and values that a decode step must read."""
        sizes = self.sizes
        width = sizes.head_dim * pool.dtype.itemsize if pool.hot == "model" else sizes.head_dim + 2
        return 2 * sizes.batch * sizes.context * sizes.kv_heads * width

    def _decode_otherwise(
        self, segments: list[Segment], pool: KVPool, queries: torch.Tensor, nbytes: int
    ) -> Iterator[Row]:
        out = torch.empty_like(queries)
        fixed = self.backend(invariant=True).plan(segments, pool)
        yield self.moved("decode invariant", nbytes, lambda: fixed.attend(0, queries, out), None)
        tables = torch.tensor([segment.slots for segment in segments], dtype=torch.int32, device=self.device)
        positions = torch.tensor([segment.start for segment in segments], device=self.device)
        recorded = self.backend().decode_plan(tables, positions, pool)
        yield self.moved("decode recorded", nbytes, lambda: recorded.attend(0, queries, out), None)
        window = self.sizes.context // 4
        near = self.backend(window=window).plan(segments, pool)
        seen = nbytes * (window + 4) // self.sizes.context
        yield self.moved("decode window", seen, lambda: near.attend(0, queries, out), None)
        alone = replace(self.sizes, batch=1)
        first = Bench(alone, self.device)
        first.copy_gb_s = self.copy_gb_s
        plan = self.backend().plan(segments[:1], pool)
        yield first.moved(
            "decode batch 1", nbytes // len(segments), lambda: plan.attend(0, queries, out), None
        )

    def copies(self, hot: str) -> Iterator[Row]:
        layout = self.sizes.layout(self.sizes.layers)
        count = self.sizes.copied_blocks
        pool = pool_of(layout, 2 * count, hot, self.device)
        slots = torch.randperm(2 * count)[:count].to(torch.int32).to(self.device)
        shape = (count, layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
        frames = torch.empty(shape, dtype=pool.dtype, device=self.device)
        coded = frames.numel() // layout.head_dim * (layout.head_dim + 2)
        nbytes = frames.nbytes + (frames.nbytes if hot == "model" else coded)
        goal = 0.8 if hot == "model" else None
        yield self.moved(f"gather {hot}", nbytes, lambda: gather(pool, slots, frames), goal)
        yield self.moved(f"scatter {hot}", nbytes, lambda: scatter(pool, slots, frames), goal)

    def prefill(self) -> Iterator[Row]:
        sizes = self.sizes
        for name, count, rows, prefix in (
            ("prefill whole", 1, sizes.context, 0),
            ("prefill chunk over prefix", 1, sizes.chunk, sizes.context - sizes.chunk),
            ("prefill four prompts", 4, sizes.chunk, 0),
        ):
            yield self.prefilled(name, count, rows, prefix)

    def prefilled(self, name: str, count: int, rows: int, prefix: int) -> Row:
        sizes, context = self.sizes, prefix + rows
        blocks = -(-context // sizes.block_tokens)
        order = torch.randperm(count * blocks).tolist()
        segments = [
            Segment(i * rows, rows, prefix, tuple(order[i * blocks : (i + 1) * blocks])) for i in range(count)
        ]
        pool = pool_of(sizes.layout(), len(order), "model", self.device)
        queries = self.queries(count * rows, pool)
        out = torch.empty_like(queries)
        plan: AttentionPlan = self.backend().plan(segments, pool)
        ours = times(lambda: plan.attend(0, queries, out), sizes.rounds, self.device)
        theirs = times(self._flash(count, rows, context, pool.dtype), sizes.rounds, self.device)
        pairs = count * (rows * prefix + rows * (rows + 1) // 2)
        flop = 4 * pairs * sizes.heads * sizes.head_dim
        median = statistics.median(ours)
        return Row(
            name, *_spread(ours), tflop_s=flop / median / 1e12, share=statistics.median(theirs) / median,
            of="SDPA flash" if self.device.type == "cuda" else "SDPA", goal=0.7,
        )  # fmt: skip

    def _flash(self, count: int, rows: int, context: int, dtype: torch.dtype) -> Callable[[], object]:
        """torch's flash kernel over contiguous keys and values of the same shape."""
        sizes = self.sizes
        query = torch.randn(count, sizes.heads, rows, sizes.head_dim, dtype=dtype, device=self.device)
        key, value = torch.randn(
            2, count, sizes.kv_heads, context, sizes.head_dim, dtype=dtype, device=self.device
        )
        mask = causal_lower_right(rows, context)
        if self.device.type != "cuda":
            return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        whole = rows == context

        def flash() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                if whole:
                    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

        return flash


def measured(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    bench = Bench(sizes, device)
    yield bench.copy()
    for hot in HOT:
        yield from bench.decode(hot)
    for hot in HOT:
        yield from bench.copies(hot)
    yield from bench.prefill()


def swept(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Decode and a whole prompt with other tunings, to see whether the table is right."""
    bench = Bench(sizes, device)
    yield bench.copy()
    for hot in HOT:
        base = sizes.tuning or Tuning.of(
            sizes.head_dim, getattr(torch, sizes.dtype), quantised=hot != "model"
        )
        segments, slots = bench.decoding()
        pool = pool_of(sizes.layout(), slots, hot, device)
        for tile, warps, stages in ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3)):
            tuning = replace(
                base, decode_tile=tile, decode_warps=warps, decode_stages=stages, split_tokens=512
            )
            name = f"decode {hot} tile {tile} warps {warps} stages {stages}"
            yield decoded(bench, name, TritonAttention(sizes.heads, (None,), tuning=tuning), segments, pool)
    for rows, tile, warps, stages in ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)):
        other = Bench(replace(sizes, tuning=Tuning(64, 4, 3, rows, tile, warps, stages)), device)
        yield other.prefilled(
            f"prefill rows {rows} tile {tile} warps {warps} stages {stages}", 1, sizes.context, 0
        )


def decoded(bench: Bench, name: str, backend: TritonAttention, segments: list[Segment], pool: KVPool) -> Row:
    queries = bench.queries(len(segments), pool)
    out = torch.empty_like(queries)
    plan = backend.plan(segments, pool)
    return bench.moved(name, bench.context_nbytes(pool), lambda: plan.attend(0, queries, out), None)


def checked(sizes: Sizes, device: torch.device) -> dict[str, float | bool]:
    """A small step of every kind, in the shapes that are measured: how far it is from float64, and whether in
    batch-invariant mode a row has the same bits alone and in company (in the interpreter, whose products are
    BLAS's, it has not)."""
    torch.manual_seed(0)
    context = 3 * sizes.block_tokens
    blocks = [tuple(range(3 * i, 3 * i + 3)) for i in range(4)]
    segments = [
        Segment(0, 1, context - 1, blocks[0]), Segment(1, 3, context - 5, blocks[1]),
        Segment(4, 20, context - 30, blocks[2]), Segment(24, 1, 0, blocks[3]),
    ]  # fmt: skip
    bench, found = Bench(sizes, device), {}
    for hot in HOT:
        pool = pool_of(sizes.layout(), 12, hot, device)
        queries = bench.queries(25, pool)
        for what, backend, window in (
            ("", bench.backend(), None),
            (" window", bench.backend(window=20), 20),
            (" invariant", bench.backend(invariant=True), None),
        ):
            ours, wanted = torch.empty_like(queries), torch.empty_like(queries)
            backend.plan(segments, pool).attend(0, queries, ours)
            reference = ReferenceAttention(sizes.heads, (window,), 4 if window else 0)
            reference.plan(segments, pool).attend(0, queries, wanted)
            found[f"{hot}{what}, from float64"] = (ours.double() - wanted.double()).abs().max().item()
        alone = torch.empty_like(queries)
        for segment in segments:
            for row in range(segment.rows):
                one = Segment(segment.row + row, 1, segment.start + row, segment.slots)
                backend.plan([one], pool).attend(0, queries, alone)
        found[f"{hot} invariant, same bits alone"] = torch.equal(alone, ours)
    return found


def _spread(seconds: list[float]) -> tuple[float, float, float]:
    return statistics.median(seconds), min(seconds), max(seconds)
