"""Triton's attention in the interpreter, beside float64: what differed, as JSON.

TRITON_INTERPRET=1 python -m tests.engine.attention.in_interpreter [--all]
"""

from __future__ import annotations

import json
import sys

import torch

from engine.attention.base import AttentionBackend, Segment
from engine.attention.reference import ReferenceAttention
from engine.attention.triton_attention import TritonAttention
from engine.attention.triton_tuning import Tuning
from engine.pool import KVPool
from engine.quantised_pool import QuantisedPool
from kvstore.nouns import KVLayout
from tests.engine.attention import interpreter  # noqa: F401 - mends it
from tests.engine.attention.cases import ALL, SOME, Case

SMALL = Tuning(16, 4, 1, 16, 16, 4, 1, split_tokens=32)
"""Tiles of 16 tokens and splits of 32, so that small contexts have many."""
PADDING = 3


def pool_of(case: Case, slots: int, generator: torch.Generator) -> KVPool:
    """Random tokens everywhere, but NaN in slot 0, which is nobody's."""
    layout = KVLayout(
        len(case.windows), 0, case.kv_heads, case.head_dim, case.dtype, block_tokens=case.block_tokens
    )
    pool = KVPool(layout, slots) if case.hot == "model" else QuantisedPool(layout, slots, case.hot)
    rows = torch.arange(slots * case.block_tokens)
    shape = (len(rows), case.kv_heads, case.head_dim)
    for layer in range(layout.layers):
        keys, values = torch.randn((2, *shape), generator=generator).to(pool.dtype)
        keys[: case.block_tokens] = values[: case.block_tokens] = torch.nan
        pool.write(layer, rows, keys, values)
    return pool


def step_of(case: Case, generator: torch.Generator) -> tuple[KVPool, list[Segment], torch.Tensor]:
    """Each segment's slots are its own, scattered; what stands behind its last token is NaN."""
    blocks = [-(-(rows + start) // case.block_tokens) for rows, start in case.rows]
    free = (1 + torch.randperm(sum(blocks), generator=generator)).tolist()
    pool = pool_of(case, len(free) + 1, generator)
    segments, row = [], 0
    for (rows, start), count in zip(case.rows, blocks, strict=True):
        segments.append(Segment(row, rows, start, tuple(free[:count])))
        del free[:count]
        row += rows
        behind = torch.arange(rows + start, count * case.block_tokens)
        nothing = torch.full((len(behind), case.kv_heads, case.head_dim), torch.nan, dtype=pool.dtype)
        last = segments[-1].slots[-1] - (count - 1)
        for layer in range(len(case.windows)):
            pool.write(layer, last * case.block_tokens + behind, nothing, nothing)
    queries = torch.randn((row + PADDING, case.heads, case.head_dim), generator=generator).to(pool.dtype)
    return pool, segments, queries


def attended(
    backend: AttentionBackend, pool: KVPool, step: list[Segment], queries: torch.Tensor
) -> torch.Tensor:
    """Of all layers."""
    plan = backend.plan(step, pool)
    out = torch.full((pool.layout.layers, *queries.shape), 7.0, dtype=queries.dtype)
    for layer in range(pool.layout.layers):
        plan.attend(layer, queries, out[layer])
    return out


def looked_at(case: Case) -> str:
    """What is wrong with it; nothing, if nothing."""
    pool, step, queries = step_of(case, torch.Generator().manual_seed(1))
    ours = attended(
        TritonAttention(
            case.heads, case.windows, case.sinks, batch_invariant=case.batch_invariant, tuning=SMALL
        ),
        pool,
        step,
        queries,
    )
    wanted = attended(ReferenceAttention(case.heads, case.windows, case.sinks), pool, step, queries)
    off = (ours.double() - wanted.double()).abs().max().item()
    return "" if off <= case.tolerance else f"{off:.1e} off in {case}"


def bits_that_vary() -> list[str]:
    """Batch-invariant: positions 24 .. 47 of one sequence as a chunk, in pieces, alone, in company."""
    different = []
    for window, sinks in ((None, 0), (24, 3)):
        case = Case(6, 2, 32, 12, windows=(window,), sinks=sinks, rows=((23, 24), (1, 40)))
        pool, (whole, other), queries = step_of(case, torch.Generator().manual_seed(2))
        backend = TritonAttention(6, (window,), sinks, batch_invariant=True, tuning=SMALL)
        wanted = attended(backend, pool, [whole], queries)[:, :23]

        def part(row: int, rows: int, of: Segment = whole) -> Segment:
            return Segment(row, rows, of.start + row, of.slots)

        steps = {
            "in company": [other, whole],
            "in pieces": [part(0, 7), part(7, 12), part(19, 4)],
            "alone": [part(row, 1) for row in (0, 7, 8, 22)],
        }
        for what, step in steps.items():
            computed = [row for s in step if s is not other for row in range(s.row, s.row + s.rows)]
            if not torch.equal(attended(backend, pool, step, queries)[:, computed], wanted[:, computed]):
                different.append(f"{what}, window {window}")
    return different


def main() -> None:
    cases = ALL if "--all" in sys.argv[1:] else SOME
    wrong = [found for found in map(looked_at, cases) if found]
    print(json.dumps({"seen": len(cases), "wrong": wrong, "varying": bits_that_vary()}))


if __name__ == "__main__":
    main()
