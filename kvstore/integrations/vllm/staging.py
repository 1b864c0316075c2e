"""Host memory for payloads between vLLM's pool and the store: slots of one block each, bounded for good.

Taken on vLLM's thread and given back on the loop's. Memory is touched once at start, up to `TOUCHED_NBYTES`,
and the slots used last are used again first: a page's first touch costs more than the copy into it, on
vLLM's time. How it fails: no room is an answer (fewer slots, or none), never a wait.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import torch

from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout

__all__ = ["TOUCHED_NBYTES", "Staging"]

TOUCHED_NBYTES: Final = 256 << 20


class Staging:
    """`memory`: all slots, flat, of the layout's dtype. Raises ConfigError for room for not one block."""

    def __init__(self, nbytes: int, layout: KVLayout, *, pinned: bool = False) -> None:
        self.slots = nbytes // layout.block_nbytes
        if self.slots < 1:
            raise ConfigError(
                f"staging of {nbytes} bytes holds no block of {layout.block_nbytes}: raise staging_nbytes"
            )
        dtype: torch.dtype = getattr(torch, layout.dtype)
        numel = layout.block_nbytes // dtype.itemsize
        self.memory = torch.empty(self.slots * numel, dtype=dtype, pin_memory=pinned)
        touched = min(self.slots, max(1, TOUCHED_NBYTES // layout.block_nbytes))
        self.memory[: touched * numel].zero_()
        self._bytes = self.memory.view(torch.uint8).numpy()
        self._block_nbytes = layout.block_nbytes
        self._free = list(range(self.slots))[::-1]
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Slots that are not free."""
        return self.slots - len(self._free)

    def take(self, count: int) -> list[int]:
        """Up to so many slots, in rising order; fewer where there is no room."""
        with self._lock:
            kept = max(0, len(self._free) - count)
            taken = self._free[kept:]
            del self._free[kept:]
        return sorted(taken)

    def give_back(self, slots: Sequence[int]) -> None:
        with self._lock:
            self._free.extend(reversed(slots))

    def payload(self, slot: int) -> memoryview:
        """The slot's bytes, writable."""
        return self._bytes[slot * self._block_nbytes : (slot + 1) * self._block_nbytes].data
