"""KV between a pool on a GPU and payloads in pinned memory, past vLLM's own work.

    out     gather on vLLM's stream -> device memory -> a side stream copies it to pinned memory
    into    a side stream copies to device memory and scatters from there

vLLM's stream waits for a gather of the bytes at memory speed, and no thread of vLLM's for anything. Device
memory is `_DEVICE_NBYTES` each way, at least one block. The kernels are held bit-equal with torch in Triton's
interpreter; on a GPU neither they nor the streams have been run yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch

from kvstore.integrations.vllm.conversion import Pieces, Pool
from kvstore.integrations.vllm.triton_pages import Pages

__all__ = ["DeviceCopies"]

_DEVICE_NBYTES: Final = 64 << 20


class DeviceCopies:
    """`Copies` of a pool on CUDA."""

    def __init__(self, pool: Pool) -> None:
        device = pool.groups[0].tensor.device
        self._pages, self._slot = Pages(pool), pool.slot_numel
        self._slots = max(1, _DEVICE_NBYTES // pool.frames.block_nbytes)
        dtype = pool.groups[0].tensor.dtype
        self._leaving, self._coming = (
            torch.empty(self._slots * self._slot, dtype=dtype, device=device) for _ in range(2)
        )
        self._out_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._in_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._left: torch.cuda.Event | None = None  # when `_leaving` may be overwritten
        self._coming_lock = threading.Lock()

    def out(self, pieces: Pieces, payloads: torch.Tensor) -> Callable[[], None]:
        vllm = torch.cuda.current_stream(self._leaving.device)
        for part, slots in self._parts(pieces):
            if self._left is not None:
                vllm.wait_event(self._left)
            self._pages.gather(part, self._leaving)
            self._out_stream.wait_stream(vllm)
            with torch.cuda.stream(self._out_stream):
                for host, there in self._pairs(slots, payloads, self._leaving):
                    host.copy_(there, non_blocking=True)
                self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._left.record(self._out_stream)
        return (lambda: None) if self._left is None else self._left.synchronize

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._coming.device))
        return event.synchronize

    def into(self, pieces: Pieces, payloads: torch.Tensor, after: Callable[[], None] | None) -> None:
        if after is not None:
            after()
        with self._coming_lock, torch.cuda.stream(self._in_stream):
            for part, slots in self._parts(pieces):
                for host, there in self._pairs(slots, payloads, self._coming):
                    there.copy_(host, non_blocking=True)
                self._pages.scatter(part, self._coming)
            self._in_stream.synchronize()

    def _parts(self, pieces: Pieces) -> Iterator[tuple[Pieces, list[int]]]:
        """As many payloads at a time as device memory holds: pieces of these, packed, and their slots."""
        slots, index = np.unique(pieces.payloads // self._slot, return_inverse=True)
        for first in range(0, len(slots), self._slots):
            mine = (index >= first) & (index < first + self._slots)
            packed = pieces.payloads[mine] % self._slot + (index[mine] - first) * self._slot
            yield Pieces(pieces.pool[:, mine], packed), slots[first : first + self._slots].tolist()

    def _pairs(
        self, slots: list[int], payloads: torch.Tensor, device: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Runs of slots side by side on both sides."""
        first = 0
        while first < len(slots):
            last = first + 1
            while last < len(slots) and slots[last] == slots[last - 1] + 1:
                last += 1
            here = payloads[slots[first] * self._slot : (slots[last - 1] + 1) * self._slot]
            yield here, device[first * self._slot : last * self._slot]
            first = last
