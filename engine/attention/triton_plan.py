"""A step laid out for Triton's kernels, on the host: blocks of work, splits and tables of slots as int32.

    [ block | block | ... ][ block | ... ][ slots of segment 0 | slots of segment 1 | ... ]
      decode, longest first  prefill, likewise

Decode blocks are launched together as long as their partial sums fit
`PARTIALS_MAX`; which launch a block is in changes no bit of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from engine.attention.base import Segment
from kvstore.nouns import KVLayout

__all__ = ["BLOCK_FIELDS", "Shape", "Work", "Works", "decode_work", "lay_out"]

Ints = npt.NDArray[np.int32]

BLOCK_FIELDS: Final = 8
"""Five are used (triton_decode.py); with eight, every block and what is behind blocks is aligned to 32 bytes:
Triton compiles a kernel anew for each alignment of its arguments."""
PARTIALS_MAX: Final = 4096
"""Partial results of all KV heads held at once: 256 MiB with 8 heads and 16 x 128 floats each."""
_DECODE_BLOCKS_MAX: Final = 4
"""Blocks of work up to which a segment counts as decoding: beyond, its context would be read too often."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of backend, pool and device decides the layout. `rows` are positions a block of each kernel holds;
    `splits_wanted` is how many programs should be there for the device to be busy."""

    decode_rows: int
    prefill_rows: int
    split_tokens: int
    split_tokens_min: int
    programs_wanted: int
    kv_heads: int
    sinks: int
    batch_invariant: bool

    def own_split(self, window: int | None) -> int:
        """Splits that sinks need: one, or none."""
        return 1 if self.sinks and window is not None else 0

    def splits(self, contexts: Sequence[int], programs: int) -> int:
        """Of each block but in batch-invariant mode."""
        most = -(-max(contexts) // self.split_tokens_min)
        return max(1, min(most, -(-self.programs_wanted // programs)))


@dataclass(frozen=True, slots=True)
class Work:
    """Blocks of one launch: `blocks` of them from int `first` on. `splits` is the launch's second axis, for
    each window of the model, and `partials` what its splits write (decode)."""

    first: int
    blocks: int
    splits: dict[int | None, int]
    partials: int


@dataclass(frozen=True, slots=True)
class Works:
    decode: tuple[Work, ...]
    prefill: Work | None


@dataclass(slots=True)
class _Block:
    row: int
    rows: int
    start: int
    segment: int

    @property
    def context(self) -> int:
        return self.start + self.rows


def lay_out(
    segments: Sequence[Segment], shape: Shape, layout: KVLayout, windows: Iterable[int | None]
) -> tuple[Ints, Works]:
    """Some 5 us a block and 40 ns a slot."""
    decode: list[_Block] = []
    prefill: list[_Block] = []
    for index, segment in enumerate(segments):
        few = segment.rows <= _DECODE_BLOCKS_MAX * shape.decode_rows
        rows, into = (shape.decode_rows, decode) if few or shape.batch_invariant else (
            shape.prefill_rows, prefill,
        )  # fmt: skip
        into.extend(
            _Block(segment.row + at, min(rows, segment.rows - at), segment.start + at, index)
            for at in range(0, segment.rows, rows)
        )
    for blocks in (decode, prefill):
        blocks.sort(key=lambda block: -block.context)
    taken = [segment.slots[: -(-segment.context // layout.block_tokens)] for segment in segments]
    tables_at = BLOCK_FIELDS * (len(decode) + len(prefill))
    starts = list(itertools.accumulate(map(len, taken), initial=tables_at))
    ints = np.zeros(starts[-1], np.int32)
    ints[tables_at:] = np.fromiter(itertools.chain.from_iterable(taken), np.int32, starts[-1] - tables_at)
    works = list(_launches(decode, shape, list(dict.fromkeys(windows)), starts, ints))
    last = None
    if prefill:
        first = BLOCK_FIELDS * len(decode)
        _write([(b.row, b.rows, b.start, starts[b.segment], 0) for b in prefill], ints[first:tables_at])
        last = Work(first, len(prefill), {}, 0)
    return ints, Works(tuple(works), last)


def decode_work(rows: int, context: int, shape: Shape, windows: Iterable[int | None]) -> Work:
    """One launch for `rows` single positions of contexts up to `context`, known on the device alone. Each has
    the same share of the partials."""
    each = -(-context // shape.split_tokens)
    if not shape.batch_invariant:
        each = shape.splits([context], rows * shape.kv_heads)
    splits = {window: each + shape.own_split(window) for window in windows}
    return Work(0, rows, splits, rows * max(splits.values()))


def _launches(
    blocks: list[_Block], shape: Shape, windows: Sequence[int | None], tables: Sequence[int], ints: Ints
) -> Iterable[Work]:
    """Write the decode blocks, and say in which launches."""
    if not blocks:
        return
    equal = shape.splits([block.context for block in blocks], len(blocks) * shape.kv_heads)
    sinks_too = max(map(shape.own_split, windows))
    done = 0
    while done < len(blocks):
        partials, first = 0, done
        fields: list[tuple[int, int, int, int, int]] = []
        while done < len(blocks):
            block = blocks[done]
            own = -(-block.context // shape.split_tokens) if shape.batch_invariant else equal
            if fields and partials + own + sinks_too > PARTIALS_MAX:
                break
            fields.append((block.row, block.rows, block.start, tables[block.segment], partials))
            partials += own + sinks_too
            done += 1
        launched = blocks[first:done]
        at = BLOCK_FIELDS * first
        _write(fields, ints[at : at + BLOCK_FIELDS * len(fields)])
        splits = {window: _axis(launched, shape, window, equal) for window in windows}
        yield Work(at, len(launched), splits, partials)


def _write(fields: list[tuple[int, int, int, int, int]], into: Ints) -> None:
    into.reshape(-1, BLOCK_FIELDS)[:, : len(fields[0])] = fields


def _axis(blocks: Sequence[_Block], shape: Shape, window: int | None, equal: int) -> int:
    if not shape.batch_invariant:
        return equal + shape.own_split(window)
    size = shape.split_tokens
    counts = (
        -(-b.context // size) - (0 if window is None else max(b.start - window + 1, 0) // size)
        for b in blocks
    )
    return max(counts) + shape.own_split(window)
