"""Pages in Triton's interpreter beside the pool's own copies, over every layout: differences as JSON.

A process of its own: triton must be imported with TRITON_INTERPRET set, and another test may have imported
it without.
"""

from __future__ import annotations

import json
import os
import random

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvstore.integrations.vllm.conversion import Pool
from kvstore.integrations.vllm.layout import probe
from kvstore.integrations.vllm.triton_pages import Pages
from kvstore.nouns import KVLayout
from tests.kvstore.integrations.vllm.backends import BACKENDS, layer_of

LAYERS, HEADS, DIM, BLOCKS = 2, 3, 4, 3


def differences(seed: int) -> tuple[list[str], int]:
    chance, different, seen = random.Random(seed), [], 0
    torch.manual_seed(seed)
    sizes = [("float32", 16, 32), ("bfloat16", 64, 32), ("float16", 32, 32)]
    for index, backend in enumerate(BACKENDS):
        for dtype, theirs, ours in (sizes[index % 3], sizes[(index + 1) % 3]):
            kind = getattr(torch, dtype)
            tensors = [backend.make(BLOCKS, theirs, HEADS, DIM, kind) for _ in range(LAYERS)]
            for tensor in tensors:
                tensor.copy_(torch.randn(tensor.shape))
            layout = probe(layer_of(backend, theirs, HEADS, DIM), tensors[0], theirs)
            pool = Pool(tensors, layout, KVLayout(LAYERS, 0, HEADS, DIM, dtype, ours))
            pages, n = Pages(pool), BLOCKS * theirs
            blocks = chance.sample(range(BLOCKS), BLOCKS)
            slots = chance.sample(range(8), -(-n // ours))
            pieces = pool.pieces(blocks, 0, n, slots)
            by_torch, by_triton = (torch.zeros(8 * pool.slot_numel, dtype=kind) for _ in range(2))
            pool.gather(pieces, by_torch)
            pages.gather(pieces, by_triton)
            before = [tensor.clone() for tensor in tensors]
            for tensor in tensors:
                tensor.zero_()
            pages.scatter(pieces, by_torch)
            same = all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
            seen += 1
            if not same or not torch.equal(by_torch, by_triton):
                different.append(f"{backend.name} {dtype} {theirs}")
    return different, seen


if __name__ == "__main__":
    drawn = random.randrange(1 << 30)
    found, looked_at = differences(drawn)
    print(json.dumps({"seed": drawn, "different": found, "seen": looked_at}))
