"""`kvstrata bench codec`: what each codec costs a model, and how fast it is beside a memcpy."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.bench.figures import GB, Spread
from kvstore.codecs import CODECS, Codec
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from cli.bench.codec_quality import Quality, Seen

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    windows: int = 6
    window_tokens: int = 1_024
    rounds: int = 9  # of speed; one more before them warms up


BLOCKS = 32  # far beyond the caches, together
QUICK = Plan(windows=1, window_tokens=128, rounds=1)


@dataclass(frozen=True, slots=True)
class Speed:
    """GB/s of lossless bytes: medians and spreads over rounds, one thread."""

    encode: Spread
    decode: Spread


@dataclass(frozen=True, slots=True)
class Result:
    """All codecs of one run."""

    plan: Plan
    layout: KVLayout
    lossless: Seen
    seen: dict[str, Seen]
    speeds: dict[str, Speed]
    memcpy: Spread


def pydoc_topics() -> str:
    """The text that is measured unless another is given: in every CPython."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def run(folder: Path, text: str, plan: Plan, progress: Progress) -> Result:
    """Raises ModelError's kinds, and ValueError for a text that is too short."""
    from cli.bench.codec_quality import Quality

    quality = Quality(folder, text, plan.windows, plan.window_tokens)
    codecs = [codec for codec in CODECS.values() if codec.number and codec.fits(quality.layout)]
    steps = (len(codecs) + 1) * len(quality)
    lossless = _over_windows(quality, None, progress, 0, steps)
    blocks = quality.blocks()
    seen = {
        codec.name: _over_windows(quality, codec, progress, len(quality) * i, steps)
        for i, codec in enumerate(codecs, 1)
    }
    speeds, memcpy = _alone(quality.layout, blocks, codecs, plan.rounds, progress)
    return Result(plan, quality.layout, lossless, seen, speeds, memcpy)


def speed_only(plan: Plan, progress: Progress) -> tuple[dict[str, Speed], Spread]:
    """Speeds over blocks like a small model's: no model and no text, and nothing about what is lost."""
    layout, draw = KVLayout(30, 0, 3, 64, "float32"), np.random.default_rng(0)
    shape = (layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    blocks = []
    for _ in range(BLOCKS if plan.rounds > 1 else 1):
        kv = draw.standard_normal(shape, dtype=np.float32)
        kv[:, 0] *= 0.2 + np.abs(draw.standard_normal(layout.head_dim, dtype=np.float32))
        blocks.append(memoryview(kv.tobytes()))
    codecs = [codec for codec in CODECS.values() if codec.number]
    return _alone(layout, blocks, codecs, plan.rounds, progress)


def _alone(
    layout: KVLayout, blocks: list[memoryview], codecs: list[Codec], rounds: int, progress: Progress
) -> tuple[dict[str, Speed], Spread]:
    """`measure` in one thread, as a memcpy has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(layout, blocks, codecs, rounds, progress)
    finally:
        torch.set_num_threads(threads)


def _over_windows(quality: Quality, codec: Codec | None, progress: Progress, done: int, steps: int) -> Seen:
    results = []
    name = "lossless" if codec is None else codec.name
    for index in range(len(quality)):
        progress(f"perplexity, {name}", done + index, steps)
        results.append(quality.window(index, codec))
    return quality.seen(results)


def measure(
    layout: KVLayout, blocks: list[memoryview], codecs: list[Codec], rounds: int, progress: Progress
) -> tuple[dict[str, Speed], Spread]:
    """Speeds over the blocks, all in the same rounds; the blocks together are far beyond the caches."""
    outs = [np.zeros(layout.block_nbytes, dtype=np.uint8) for _ in blocks]
    sources = [np.frombuffer(block, dtype=np.uint8) for block in blocks]
    nbytes = layout.block_nbytes * len(blocks)
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)

    def timed(row: tuple[str, str], work: Callable[[int], Any]) -> list[Any]:
        started = time.perf_counter()
        answers = [work(i) for i in range(len(blocks))]
        figures[row].append(nbytes / GB / (time.perf_counter() - started))
        return answers

    for turn in range(rounds + 1):
        progress("speed", turn, rounds + 1)
        timed(("", "memcpy"), lambda i: np.copyto(outs[i], sources[i]))
        for codec in codecs:
            encoded = timed((codec.name, "encode"), lambda i, c=codec: c.encode(layout, blocks[i]))  # type: ignore[misc]
            timed((codec.name, "decode"), lambda i, c=codec, e=encoded: c.decode(layout, e[i], outs[i].data))  # type: ignore[misc]
    spreads = {row: Spread.of(values[1:]) for row, values in figures.items()}
    speeds = {c.name: Speed(spreads[c.name, "encode"], spreads[c.name, "decode"]) for c in codecs}
    return speeds, spreads["", "memcpy"]
