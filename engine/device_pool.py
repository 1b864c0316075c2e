"""A device's memory for KV, and how blocks leave and enter it.

    out, of the engine   gather on the compute stream -> [staged] -> copy beside it -> [pinned] -> payload
    out, of any thread   the same beside the compute stream, and waited for
    in, of any thread    payload -> [pinned, one of a ring] -> copy and scatter beside; then computing waits

What the engine's thread takes out is gathered by the compute stream itself, so a slot may change hands in the
next step; only the way over the bus lies beside, and nobody waits for it. All else goes behind what the
compute stream was given before, and computing goes on behind what was written: no order of threads can read
half a block. Whoever reads from another thread has lent the slot (kvstore/tiers/device.py) until he returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from engine.device import Device, Mark
from engine.pool import BlockRead, KVPool
from engine.weights import DTYPES
from kvstore.nouns import KVLayout

__all__ = ["DeviceStorage"]

Bytes = npt.NDArray[np.uint8]

RING_BUFFERS: Final = 4
"""Pinned buffers for blocks on their way in: one is filled while others are copied from."""
GATHER_MIN: Final = 4
"""Blocks that are worth a kernel for all of them; fewer are copied one by one."""


Gather = Callable[[KVPool, torch.Tensor, torch.Tensor], None]


def _gather_kernel(device: torch.device) -> Gather | None:
    """Triton's, on a GPU that has Triton."""
    if device.type == "cpu":
        return None
    try:
        from engine.attention.triton_copy import gather
    except ImportError:
        return None
    return gather


class DeviceStorage:
    """See the module."""

    def __init__(self, layout: KVLayout, n_slots: int, device: Device) -> None:
        self._device = device
        self._dtype = DTYPES[layout.dtype]
        shape = (layout.layers, 2, n_slots, layout.block_tokens, layout.kv_heads, layout.head_dim)
        self.data = torch.zeros(shape, dtype=self._dtype, device=device.torch_device)
        self._pool = KVPool(layout, n_slots, self)  # what kernels know it as
        self._lock = threading.Lock()
        self._ring: list[tuple[torch.Tensor, Mark]] = [
            (device.pinned(layout.block_nbytes), device.mark()) for _ in range(RING_BUFFERS)
        ]
        self._written = 0

    def read(self, slot: int, tokens: int, out: Bytes) -> None:
        pinned = self._device.pinned(out.nbytes)
        with torch.inference_mode(), self._device.beside():
            staged = self.data[:, :, slot, :tokens].contiguous()
            self._typed(pinned, staged.shape).copy_(staged, non_blocking=True)
            mark = self._device.mark()
        mark.synchronize()
        out[...] = pinned.numpy()

    def write(self, slot: int, tokens: int, source: Bytes) -> None:
        target = self.data[:, :, slot, :tokens]
        with self._lock:
            turn = self._written % RING_BUFFERS
            pinned, used = self._ring[turn]
            used.synchronize()
            pinned.numpy()[: source.nbytes] = source
            with torch.inference_mode(), self._device.beside():
                staged = self._typed(pinned[: source.nbytes], target.shape).to(
                    target.device, non_blocking=True
                )
                target.copy_(staged)
                mark = self._device.mark()
            self._device.wait_for(mark)
            self._ring[turn] = pinned, mark
            self._written += 1

    def begin_read(self, slots: Sequence[int]) -> BlockRead:
        shape = (len(slots), *self.data.shape[:2], *self.data.shape[3:])
        with torch.inference_mode():
            staged = torch.empty(shape, dtype=self._dtype, device=self.data.device)
            self._gather(slots, staged)
            pinned = self._device.pinned(staged.nbytes)
            with self._device.beside():
                self._typed(pinned, shape).copy_(staged, non_blocking=True)
                mark = self._device.mark()
        return _BlocksUnderWay(pinned.view(len(slots), -1), staged, mark)

    def _gather(self, slots: Sequence[int], staged: torch.Tensor) -> None:
        gather = _gather_kernel(self.data.device) if len(slots) >= GATHER_MIN else None
        if gather is None:
            for slot, block in zip(slots, staged, strict=True):
                block.copy_(self.data[:, :, slot])
            return
        pinned = self._device.pinned(4 * len(slots)).view(torch.int32)
        pinned.numpy()[:] = slots
        gather(self._pool, pinned.to(self.data.device, non_blocking=True), staged)

    def _typed(self, pinned: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return pinned.view(self._dtype).view(*shape)


class _BlocksUnderWay:
    """Holds what the copy reads until it is done: another stream than the one that it was allocated on."""

    def __init__(self, pinned: torch.Tensor, staged: torch.Tensor, mark: Mark) -> None:
        self._pinned = pinned
        self._staged: torch.Tensor | None = staged
        self._mark = mark

    def done(self) -> bool:
        return self._mark.query()

    def take(self) -> list[Bytes]:
        self._mark.synchronize()
        self._staged = None
        return list(self._pinned.numpy())
