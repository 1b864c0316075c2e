"""Triton's gather, scatter and quantising writes in the interpreter, beside the pool's own: what differed.

    TRITON_INTERPRET=1 python -m tests.engine.attention.copies_in_interpreter

And decoding over tables that lie on the device, beside float64.
"""

from __future__ import annotations

import json

import torch

from engine.attention.reference import ReferenceAttention
from engine.attention.triton_attention import TritonAttention
from engine.attention.triton_copy import gather, scatter, write_rows
from engine.pool import KVPool
from engine.quantised_pool import QuantisedPool
from kvstore.nouns import KVLayout
from tests.engine.attention.cases import Case
from tests.engine.attention.in_interpreter import SMALL, attended, step_of

SLOTS = (4, 0, 2)
LAYOUTS = (
    KVLayout(2, 0, 2, 16, "float32", 4),
    KVLayout(2, 0, 3, 20, "bfloat16", 5),
    KVLayout(1, 0, 1, 33, "float16", 3),
    KVLayout(1, 0, 2, 130, "float32", 8),
)


def made(layout: KVLayout, hot: str) -> KVPool:
    return KVPool(layout, 6) if hot == "model" else QuantisedPool(layout, 6, hot)


def blocks_of(layout: KVLayout, draw: torch.Generator) -> torch.Tensor:
    shape = (len(SLOTS), layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    kv = torch.randn(shape, generator=draw)
    kv[0] *= 2.0**-14
    kv[1, ..., ::3] = 0
    kv[2, 0, 0] = 0
    return kv.to(getattr(torch, layout.dtype))


def copies(layout: KVLayout, hot: str) -> list[str]:
    """Both pools are filled beforehand: what is nobody's business must stay."""
    draw = torch.Generator().manual_seed(3)
    ours, theirs, blocks = made(layout, hot), made(layout, hot), blocks_of(layout, draw)
    for pool in (ours, theirs):
        for slot in range(6):
            pool.write_block(slot, memoryview(blocks[slot % 3].view(torch.uint8).numpy().tobytes()))
    new = blocks_of(layout, draw)
    scatter(ours, torch.tensor(SLOTS, dtype=torch.int32), new)
    for slot, block in zip(SLOTS, new, strict=True):
        theirs.write_block(slot, memoryview(block.contiguous().view(torch.uint8).numpy().tobytes()))
    wrong = [f"scatter {layout} {hot}"] if held(ours) != held(theirs) else []
    out = torch.empty_like(new)
    gather(ours, torch.tensor(SLOTS, dtype=torch.int32), out)
    read = b"".join(theirs.read_block(slot).tobytes() for slot in SLOTS)
    if out.view(torch.uint8).numpy().tobytes() != read:
        wrong.append(f"gather {layout} {hot}")
    if isinstance(ours, QuantisedPool) and isinstance(theirs, QuantisedPool):
        rows = torch.tensor([7, 0, 3 * layout.block_tokens - 1])
        keys, values = new[:, 0, 0, 0], new[:, -1, 1, 1]
        write_rows(ours, layout.layers - 1, rows, keys, values)
        theirs.write(layout.layers - 1, rows, keys, values)
        if held(ours) != held(theirs):
            wrong.append(f"write {layout} {hot}")
    return wrong


def held(pool: KVPool) -> bytes:
    parts = (pool.codes, pool.scales) if isinstance(pool, QuantisedPool) else (pool.data,)
    return b"".join(part.contiguous().flatten().view(torch.uint8).numpy().tobytes() for part in parts)


def recorded_decode(case: Case) -> list[str]:
    """A plan over tables and positions that the host does not read."""
    wrong = []
    width = 6
    tables = torch.zeros(len(case.rows), width, dtype=torch.int32)
    positions = torch.zeros(len(case.rows), dtype=torch.int64)
    pool, step, queries = step_of(case, torch.Generator().manual_seed(4))
    backend = TritonAttention(case.heads, case.windows, case.sinks, tuning=SMALL)
    wanted = attended(ReferenceAttention(case.heads, case.windows, case.sinks), pool, step, queries)
    for row, segment in enumerate(step):
        tables[row, : len(segment.slots)] = torch.tensor(segment.slots, dtype=torch.int32)
        positions[row] = segment.start
    plan = backend.decode_plan(tables, positions, pool)
    out = torch.full_like(wanted, 7.0)
    for layer in range(len(case.windows)):
        plan.attend(layer, queries, out[layer])
    off = (out.double() - wanted.double()).abs().max().item()
    if off > case.tolerance:
        wrong.append(f"{off:.1e} off in {case} over tables on the device")
    return wrong


def main() -> None:
    cases = [(layout, hot) for layout in LAYOUTS for hot in ("model", "int8", "fp8")]
    wrong = [what for layout, hot in cases for what in copies(layout, hot)]
    decoding = Case(rows=((1, 0), (1, 40), (1, 77), (1, 95)), windows=(None, 20), sinks=2)
    wrong += recorded_decode(decoding)
    print(json.dumps({"seen": len(cases), "wrong": wrong}))


if __name__ == "__main__":
    main()
