"""KV on its way between vLLM's pool and the payloads of frames, many blocks at once.

    pool       one tensor a layer, vLLM's block ids, a block as `layout.py` found it
    payloads   [slot] [layer][k,v][token][kv_head][head_dim]     of `block_tokens` tokens, contiguous

Tokens move in *pieces*, the smaller of the two block sizes, which divides the larger. Pieces that follow each
other at one distance on both sides are one run, and layers that lie so in one memory are one group (in vLLM
all do), so a copy moves K or V of a run for all layers of a group: 2,048 tokens of 30 layers are 32 copies.
Measured (2 cores, 94 MB, K transposed by the CPU's kernels): 16 ms out, 12 ms back, memcpy of the bytes 7 ms.

On CUDA a kernel gathers and scatters (`triton_pages.py`) between the pool and a copy on the device, see
`device_copy.py`. Only a worker of vLLM loads this module: it has torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.integrations.vllm.layout import BlockLayout
from kvstore.nouns import KVLayout

__all__ = ["Group", "Pieces", "Pool", "Run"]

Index = NDArray[np.int64]


class Pieces(NamedTuple):
    """Where pieces begin, in elements: K and V in the pool's first layer, [2, pieces]; K of the payloads'
    first layer, [pieces]."""

    pool: Index
    payloads: Index


class Run(NamedTuple):
    """Pieces at one distance of each other on both sides."""

    pieces: int
    pool: int
    pool_step: int
    payloads: int
    payloads_step: int


class Group(NamedTuple):
    """Consecutive layers that lie at one distance in one memory."""

    tensor: torch.Tensor  # the first of them
    first: int
    layers: int
    stride: int


class Pool:
    """The paged pool of one worker, its layers in the model's order.

    Raises ConfigError when neither block size divides the other, or pieces of a packed block cannot be moved
    by themselves.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], layout: BlockLayout, frames: KVLayout) -> None:
        ours = (layout.kv_heads, layout.head_dim, layout.dtype, len(tensors))
        if ours != (frames.kv_heads, frames.head_dim, frames.dtype, frames.layers):
            raise ConfigError(f"a pool of (heads, head_dim, dtype, layers) {ours} does not hold {frames}")
        sizes = sorted((layout.block_tokens, frames.block_tokens))
        if sizes[1] % sizes[0]:
            raise ConfigError(
                f"vLLM's blocks of {layout.block_tokens} tokens and ours of {frames.block_tokens}: one must "
                "be a multiple of the other; set block_tokens or --block-size"
            )
        self.layout, self.frames = layout, frames
        self.piece_tokens = sizes[0]
        self.groups = _groups(tensors)
        self._token_numel = frames.kv_heads * frames.head_dim
        self._half_numel = self._token_numel * frames.block_tokens
        self.layer_numel = 2 * self._half_numel
        self.slot_numel = self.layer_numel * frames.layers
        cut = [half.pieces(self.piece_tokens) for half in (layout.key, layout.value)]
        self._begins = np.stack([begins for begins, _ in cut])
        self._digits = [
            (*tokens, *(d for d in (*half.head, *half.dim) if d.size > 1))
            for half, (_, tokens) in zip((layout.key, layout.value), cut, strict=True)
        ]

    @property
    def half_numel(self) -> int:
        """Elements of K of one layer of a payload: V lies as far behind it."""
        return self._half_numel

    def tables(self) -> list[Index]:
        """Of K and V: where the elements of a piece lie in the pool, in the order payloads have them."""
        halves = (self.layout.key, self.layout.value)
        return [(half.offsets()[: self.piece_tokens] - half.base).reshape(-1) for half in halves]

    def pieces(self, block_ids: Sequence[int], begin: int, end: int, slots: Sequence[int]) -> Pieces:
        """Tokens `begin .. end` of a sequence, multiples of the piece.

        `block_ids[0]` is the vLLM block that holds token `begin`, `slots[0]` has the payload that does.
        """
        size, theirs, ours = self.piece_tokens, self.layout.block_tokens, self.frames.block_tokens
        tokens = np.arange(begin, end, size, dtype=np.int64)
        blocks = np.asarray(block_ids, dtype=np.int64)[tokens // theirs - begin // theirs]
        places = np.asarray(slots, dtype=np.int64)[tokens // ours - begin // ours]
        within = tokens % ours * self._token_numel
        return Pieces(
            blocks * self.layout.block_stride + self._begins[:, tokens % theirs // size],
            places * self.slot_numel + within,
        )

    def gather(self, pieces: Pieces, payloads: torch.Tensor) -> None:
        """Out of the pool, into `payloads`: flat, of the pool's dtype, on the CPU as the pool."""
        for mine, theirs in self._views(pieces, payloads):
            theirs.copy_(mine)

    def scatter(self, pieces: Pieces, payloads: torch.Tensor) -> None:
        """Into the pool."""
        for mine, theirs in self._views(pieces, payloads):
            mine.copy_(theirs)

    def _views(self, pieces: Pieces, payloads: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each run, half and group: [layer][piece][token][kv_head][head_dim], axes in digits."""
        for half, digits in enumerate(self._digits):
            sizes = [digit.size for digit in digits]
            strides = [digit.stride for digit in digits]
            packed = _packed(sizes)
            for run in _runs(pieces.pool[half], pieces.payloads + half * self._half_numel):
                for group in self.groups:
                    shape = (group.layers, run.pieces, *sizes)
                    at = group.tensor.storage_offset() + run.pool
                    mine = group.tensor.as_strided(shape, (group.stride, run.pool_step, *strides), at)
                    at = run.payloads + group.first * self.layer_numel
                    steps = (self.layer_numel, run.payloads_step, *packed)
                    yield mine, payloads.as_strided(shape, steps, payloads.storage_offset() + at)


def _runs(pool: Index, payloads: Index) -> Iterator[Run]:
    """The longest runs from each one's first piece on. None goes backwards: torch has no such strides."""
    steps = np.stack([np.diff(pool), np.diff(payloads)])
    first = 0
    while first < len(pool):
        rest = steps[:, first:]
        breaks = np.flatnonzero((rest != rest[:, :1]).any(axis=0) | (rest < 0).any(axis=0))
        count = 1 + (int(breaks[0]) if len(breaks) else rest.shape[1])
        pool_step, payloads_step = rest[:, 0].tolist() if count > 1 else (0, 0)
        yield Run(count, int(pool[first]), pool_step, int(payloads[first]), payloads_step)
        first += count


def _groups(tensors: Sequence[torch.Tensor]) -> tuple[Group, ...]:
    groups: list[Group] = []
    for index, tensor in enumerate(tensors):
        last = groups[-1] if groups else None
        if last is not None and _shares(tensor, last.tensor):
            distance = int(tensor.storage_offset() - last.tensor.storage_offset())
            if last.layers == 1 or distance == last.layers * last.stride:
                stride = distance if last.layers == 1 else last.stride
                groups[-1] = Group(last.tensor, last.first, last.layers + 1, stride)
                continue
        groups.append(Group(tensor, index, 1, 0))
    return tuple(groups)


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _packed(sizes: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return strides if sizes else []
