"""Pieces of blocks between a pool on a device and payloads there, by Triton: what `Pool` does, for CUDA.

A program moves a part of one piece of K or V of one layer: payloads are written and read in order, the pool
where a table of the piece's element offsets says, which all pieces and layers share. Elements are moved as
integers of their size, so bits are bits. Two launches for each group of layers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton's functions are compiled from their text: types of Python mean nothing there.

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl

from kvstore.integrations.vllm.conversion import Pieces, Pool

__all__ = ["Pages"]

_PART: Final = 1024  # elements of a program
_PIECES_MAX: Final = 65_535  # of a launch: what a grid's last axis takes
_WORDS: Final = {4: torch.int32, 2: torch.int16}


@triton.jit
def _move(
    pool, payloads, pool_at, payloads_at, table, layer_stride, layer_numel, numel,
    IN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Grid (parts of a piece, layers, pieces)."""
    layer, piece = tl.program_id(1).to(tl.int64), tl.program_id(2)
    element = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = element < numel
    offset = tl.load(table + element, mask=inside, other=0)
    here = pool + layer * layer_stride + tl.load(pool_at + piece) + offset
    there = payloads + layer * layer_numel + tl.load(payloads_at + piece) + element
    if IN:
        tl.store(here, tl.load(there, mask=inside), mask=inside)
    else:
        tl.store(there, tl.load(here, mask=inside), mask=inside)


class Pages:
    """`pool`, with `gather` and `scatter` on its device, on the stream that is current there."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._device = pool.groups[0].tensor.device
        self._tables = [torch.from_numpy(table.astype(np.int32)).to(self._device) for table in pool.tables()]
        self._memories = [_words(group.tensor) for group in pool.groups]

    def gather(self, pieces: Pieces, payloads: torch.Tensor) -> None:
        """Out of the pool, into `payloads`, flat, on the same device."""
        self._run(pieces, payloads, into_pool=False)

    def scatter(self, pieces: Pieces, payloads: torch.Tensor) -> None:
        """Into the pool."""
        self._run(pieces, payloads, into_pool=True)

    def _run(self, pieces: Pieces, payloads: torch.Tensor, *, into_pool: bool) -> None:
        pool, words = self._pool, _words(payloads)
        for half, table in enumerate(self._tables):
            grid_x = triton.cdiv(len(table), _PART)
            for first in range(0, len(pieces.payloads), _PIECES_MAX):
                some = slice(first, first + _PIECES_MAX)
                pool_at = self._there(pieces.pool[half, some])
                for group, memory in zip(pool.groups, self._memories, strict=True):
                    at = half * pool.half_numel + group.first * pool.layer_numel
                    payloads_at = self._there(pieces.payloads[some] + at)
                    _move[(grid_x, group.layers, len(pool_at))](
                        memory, words, pool_at, payloads_at, table, group.stride, pool.layer_numel,
                        len(table), IN=into_pool, PART=_PART,
                    )  # fmt: skip

    def _there(self, offsets: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
        """On the device, in the current stream's order, without waiting for what it has to do before."""
        host = torch.from_numpy(np.ascontiguousarray(offsets))
        if self._device.type == "cuda":
            # Torch takes pinned memory back once the copies out of it are done: nothing to keep here.
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """All of the tensor's memory from its first element on, as integers."""
    numel = tensor.untyped_storage().nbytes() // tensor.itemsize - int(tensor.storage_offset())
    return tensor.as_strided((numel,), (1,), tensor.storage_offset()).view(_WORDS[tensor.itemsize])
