"""The pool of a model over ranks: slots are the same in every rank, a block lies in all of them.

    a block outside    [rank 0's block][rank 1's block] ...     each in the layout of that rank's heads

So what the engine takes in and gives out is all ranks' parts, one behind the other, and agreement.py cuts
them: the store gets one block a rank, in that rank's namespace. These bytes are never a block of the whole
model's layout, though they are as many.

Rank 0's share is read and written in place, others' go over their link (link.py): a copy more, and a round
trip to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.parallel.agreement import shares
from engine.parallel.processes import RankProcesses
from engine.parallel.shares import HeadShare
from engine.pool import BlockRead, Bytes, CopiedBlocks, KVPool
from kvstore.nouns import KVLayout, Quality

__all__ = ["ParallelPool"]


class ParallelPool(KVPool):
    """`own` is rank 0's. What kernels read is that share alone; blocks and tails are all ranks'."""

    def __init__(self, own: KVPool, processes: RankProcesses) -> None:
        self.layout = own.layout
        self.n_slots = own.n_slots
        self._own = own
        self._processes = processes
        self._ranks = processes.ranks

    @property
    def layouts(self) -> tuple[KVLayout, ...]:
        return tuple(HeadShare(rank, self._ranks).layout(self.layout) for rank in range(self._ranks))

    @property
    def hot(self) -> str:
        return self._own.hot

    @property
    def quality(self) -> Quality:
        return self._own.quality

    @property
    def dtype(self) -> torch.dtype:
        return self._own.dtype

    @property
    def device(self) -> torch.device:
        return self._own.device

    @property
    def data(self) -> torch.Tensor:
        return self._own.data

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._own.held(layer)

    def keys(self, layer: int) -> torch.Tensor:
        return self._own.keys(layer)

    def values(self, layer: int) -> torch.Tensor:
        return self._own.values(layer)

    def write(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._own.write(layer, rows, keys, values)

    @property
    def block_nbytes(self) -> int:
        return self._ranks * self._own.block_nbytes

    def copy_out(self, slot: int, out: Bytes) -> None:
        out.reshape(-1)[...] = self.read_block(slot)

    def read_tail(self, slot: int, tokens: int) -> Bytes:
        (payload,) = self.read_many([slot], tokens)
        return payload

    def read_many(self, slots: Sequence[int], tokens: int) -> list[Bytes]:
        """Of each slot the first `tokens` tokens, all ranks' shares; one round trip."""
        size = tokens * self.layout.token_nbytes
        self._processes.ask_for(slots, tokens)
        payloads = [np.empty((self._ranks, size), np.uint8) for _ in slots]
        for slot, payload in zip(slots, payloads, strict=True):
            payload[0] = self._own.read_tail(slot, tokens)
        for rank in range(1, self._ranks):
            came = np.frombuffer(self._processes.take_from(rank, len(slots) * size), np.uint8)
            for payload, share in zip(payloads, came.reshape(len(slots), size), strict=True):
                payload[rank] = share
        return [payload.reshape(-1) for payload in payloads]

    def begin_read(self, slots: Sequence[int]) -> BlockRead:
        """Waited for: they come over the links."""
        return CopiedBlocks(self.read_many(slots, self.layout.block_tokens))

    def write_tail(self, slot: int, payload: memoryview | Bytes, tokens: int) -> None:
        nbytes, given = (
            self._ranks * tokens * self.layout.token_nbytes,
            np.frombuffer(payload, np.uint8).nbytes,
        )
        if given != nbytes or not 0 < tokens <= self.layout.block_tokens:
            raise ValueError(
                f"KV of {tokens} tokens over {self._ranks} ranks must have {nbytes} bytes, got {given}"
            )
        first, *others = shares(payload, self._ranks)
        for rank, share in enumerate(others, 1):
            self._processes.give(rank, slot, tokens, share)
        self._own.write_tail(slot, first, tokens)

    def copy_block(self, source: int, target: int, tokens: int) -> None:
        """Each rank its own share, where it lies; nothing of it goes over a link."""
        self._processes.copy(source, target, tokens)
        self._own.copy_block(source, target, tokens)
