"""Decode steps as CUDA graphs: one launch for a whole forward pass, recorded once for each padded batch size.

    host     token ids | positions | pool rows | tables          pinned, two in turn
                   one copy a step
    device   token ids | positions | pool rows | tables          always the same addresses
                   replay(size)
    device   logits [size, vocabulary]                           valid until the next replay

A batch is padded to the next recorded size with rows of token 0 at position 0 of a slot of nobody's.
A table row is written again only when its sequence's slots changed. Nothing here waits for the device, but
for the copy before last. CUDA graphs: NVIDIA's programming guide, "CUDA Graphs"; padded sizes as in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import torch

from engine.attention.base import AttentionBackend, AttentionPlan
from engine.batch import Batch, make_batch
from engine.device import Device, Mark, Recorded
from engine.models.llama import StepInput
from engine.pool import KVPool

__all__ = ["DecodeGraphs", "PagedDecode", "graph_sizes"]

IN_TURN: Final = 2
"""Pinned inputs: the host fills one while the device may still copy from the other."""


class PagedDecode(AttentionBackend, Protocol):
    """An attention backend whose decoding can be recorded."""

    def decode_plan(self, tables: torch.Tensor, positions: torch.Tensor, pool: KVPool) -> AttentionPlan:
        """Row i of the step is the token at `positions[i]` (int64) of the sequence whose slots are
        `tables[i]` (int32 [rows, blocks]; behind its context any slot). Both are read on the device at every
        replay, never by the host."""
        ...


Compute = Callable[[StepInput, AttentionPlan], torch.Tensor]
"""One forward pass of decoding rows: float32 [rows, vocabulary]."""


class DecodeGraphs:
    """Recording takes a second or so a size. Engine thread. `spare_slot` is a slot of the pool for the rows
    that pad a batch."""

    def __init__(
        self,
        device: Device,
        pool: KVPool,
        attention: PagedDecode,
        compute: Compute,
        *,
        rows_max: int,
        blocks_max: int,
        spare_slot: int,
    ) -> None:
        self.sizes = graph_sizes(rows_max)
        self._device = device
        self._inputs = [_HostInputs(device, rows_max, blocks_max, pool, spare_slot) for _ in range(IN_TURN)]
        self._turn = 0
        on_device = torch.zeros(self._inputs[0].nbytes, dtype=torch.uint8, device=device.torch_device)
        self._on_device = on_device
        token_ids, positions, pool_rows, tables = _columns(on_device, rows_max, blocks_max)
        self._send(self._inputs[0], make_batch((), pool.layout.block_tokens), self.sizes[-1])
        self._recorded: dict[int, Recorded] = {}

        def work(step: StepInput, tables: torch.Tensor) -> torch.Tensor:
            return compute(step, attention.decode_plan(tables, step.positions, pool))

        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            every = torch.arange(size, device=device.torch_device)
            step = StepInput(token_ids[:size], positions[:size], pool_rows[:size], every)
            self._recorded[size] = device.record(partial(work, step, tables[:size]))

    def can_run(self, batch: Batch) -> bool:
        """Is it a token each of sequences that need logits, and not too many of them?"""
        rows = len(batch.segments)
        return rows <= self.sizes[-1] and len(batch.logits_rows) == len(batch.token_ids) == rows

    def run(self, batch: Batch) -> torch.Tensor:
        """float32 [rows, vocabulary], valid until the next run."""
        rows = len(batch.segments)
        size = next(size for size in self.sizes if size >= rows)
        inputs = self._inputs[self._turn]
        self._turn = (self._turn + 1) % IN_TURN
        self._send(inputs, batch, size)
        return self.replay(size)[:rows]

    def replay(self, size: int) -> torch.Tensor:
        """Compute the step of `size` rows over the inputs that lie there: float32 [size, vocabulary]."""
        recorded = self._recorded[size]
        recorded.replay()
        return recorded.result

    def _send(self, inputs: _HostInputs, batch: Batch, size: int) -> None:
        inputs.sent.synchronize()
        nbytes = inputs.fill(batch, size)
        self._on_device[:nbytes].copy_(inputs.pinned[:nbytes], non_blocking=True)
        inputs.sent = self._device.mark()


class _HostInputs:
    """One pinned image of the device's inputs, and what it holds of each row's slots."""

    def __init__(self, device: Device, rows_max: int, blocks_max: int, pool: KVPool, spare_slot: int) -> None:
        self._table_nbytes = 4 * blocks_max
        self.nbytes = rows_max * (3 * 8 + self._table_nbytes)
        self.pinned = device.pinned(self.nbytes)
        self.sent: Mark = device.mark()
        columns = _columns(self.pinned, rows_max, blocks_max)
        self._token_ids, self._positions, self._pool_rows, self._tables = (c.numpy() for c in columns)
        self._spare_slot = spare_slot
        self._spare_row = spare_slot * pool.layout.block_tokens
        self._tables[:] = spare_slot
        self._known: list[tuple[int, ...]] = [()] * rows_max

    def fill(self, batch: Batch, size: int) -> int:
        """How many bytes of it matter: tables come last, and of these the first `size`."""
        segments = batch.segments
        rows = len(segments)
        self._token_ids[:rows], self._token_ids[rows:size] = batch.token_ids.numpy(), 0
        self._positions[:rows], self._positions[rows:size] = batch.positions.numpy(), 0
        self._pool_rows[:rows], self._pool_rows[rows:size] = batch.pool_rows.numpy(), self._spare_row
        for row in range(size):
            slots = segments[row].slots if row < rows else ()
            if self._known[row] != slots:
                self._tables[row, : len(slots)] = slots
                self._tables[row, len(slots) :] = self._spare_slot
                self._known[row] = slots
        return self.nbytes - (len(self._known) - size) * self._table_nbytes


def _columns(
    inputs: torch.Tensor, rows_max: int, blocks_max: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 -> token ids, positions, pool rows: int64 [rows_max]; tables: int32 [rows_max, blocks_max]."""
    wide = 3 * 8 * rows_max
    token_ids, positions, pool_rows = inputs[:wide].view(torch.int64).view(3, rows_max)
    return token_ids, positions, pool_rows, inputs[wide:].view(torch.int32).view(rows_max, blocks_max)


def graph_sizes(rows_max: int) -> tuple[int, ...]:
    """1, 2, 4, 8, ... and `rows_max`.

    graph_sizes(12) == (1, 2, 4, 8, 12)
    """
    sizes = [1]
    while sizes[-1] * 2 < rows_max:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if sizes[-1] == rows_max else (*sizes, rows_max)
