"""Steps that Triton's attention meets, and how far from float64 it may be. Contexts lie around the edges of
blocks, tiles (16 tokens), splits (32) and windows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Final

from engine.attention.base import Windows

__all__ = ["ALL", "SOME", "Case"]

TOLERANCES: Final = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""Greatest absolute difference where keys, queries and values are drawn from a normal distribution."""

Rows = tuple[tuple[int, int], ...]
"""(rows, start) of each segment."""

DECODING: Final[Rows] = ((1, 0), (1, 15), (1, 16), (1, 31), (1, 32), (1, 64))
MIXED: Final[Rows] = ((1, 37), (3, 30), (21, 27), (18, 0))


@dataclass(frozen=True, slots=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block_tokens: int = 16
    dtype: str = "float32"
    windows: Windows = (None,)
    sinks: int = 0
    batch_invariant: bool = False
    hot: str = "model"
    rows: Rows = MIXED

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]


SOME: Final = (
    Case(rows=DECODING),
    Case(heads=6, head_dim=48, block_tokens=12, windows=(20,), sinks=3),
    Case(heads=6, head_dim=48, block_tokens=12, windows=(20,), sinks=3, batch_invariant=True),
    Case(heads=3, kv_heads=1, head_dim=64, dtype="bfloat16", windows=(None, 33)),
    Case(heads=4, kv_heads=1, head_dim=40, dtype="float16", block_tokens=5, windows=(1,)),
    Case(heads=20, kv_heads=1, hot="int8", dtype="bfloat16", rows=((1, 40), (25, 20))),
    Case(hot="fp8", windows=(16,), sinks=17, block_tokens=8),
    Case(hot="int8", kv_heads=4, rows=DECODING, batch_invariant=True, windows=(32,), sinks=1),
)
"""The default: every feature, and most pairs of them, in tiny shapes."""


def _all() -> tuple[Case, ...]:
    heads = ((4, 2), (7, 1), (2, 2), (32, 2))
    shapes = [
        Case(heads=h, kv_heads=kv, head_dim=d, block_tokens=b)
        for (h, kv), (d, b) in itertools.product(heads, ((32, 16), (80, 7), (128, 32), (256, 64)))
    ]
    masks = [
        Case(windows=(window,), sinks=sinks, batch_invariant=invariant, rows=rows)
        for window, sinks, invariant, rows in itertools.product(
            (None, 1, 16, 31, 64, 500), (0, 1, 16, 40), (False, True), (DECODING, MIXED)
        )
        if window is not None or not sinks
    ]
    pools = [
        Case(dtype=dtype, hot=hot, head_dim=d, batch_invariant=invariant, windows=(None, 24), sinks=2)
        for dtype, hot, d, invariant in itertools.product(
            TOLERANCES, ("model", "int8", "fp8"), (64, 96), (False, True)
        )
    ]
    edges = [replace(Case(), rows=((1, c), (2, c), (17, c))) for c in (1, 14, 15, 16, 17, 47, 48, 63, 65)]
    return (*shapes, *masks, *pools, *edges)


ALL: Final = _all()
