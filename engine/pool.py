"""The paged pool: where a running sequence's keys and values live, block by block.

    data   [layer][k, v][slot][token][kv_head][head_dim]     one tensor, allocated once
    block  [layer][k, v]      [token][kv_head][head_dim]     the same bytes outside: the frame's payload

Layer first, so that a layer's keys of adjacent slots are one piece of memory that attention reads in place.
The last axes are those of a frame: a block leaves or enters by one strided copy (1.5 MB: about 0.3 ms on a
CPU) and no bit changes on the way. Who owns a slot is the matter of kvstore/tiers/pool_slots.py: a sequence's
alone, or a full block's of the edge shard, which any number of sequences read and nobody writes.

`KVPool` is where tokens lie; its storage is whose memory that is and how bytes get out of it and in: the
host's (here) or a device's (engine/device_pool.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.weights import DTYPES
from kvstore.nouns import KVLayout, Quality

__all__ = ["BlockRead", "CopiedBlocks", "HostStorage", "KVPool", "PoolStorage"]

Bytes = npt.NDArray[np.uint8]


class BlockRead(Protocol):
    """Blocks on their way out of the pool. Their slots may change hands meanwhile."""

    def done(self) -> bool: ...

    def take(self) -> list[Bytes]:
        """Copies in the frame's layout, in the order asked for. Waits for them."""
        ...


class PoolStorage(Protocol):
    """Memory for blocks. `read` and `write` are called from any thread, `begin_read` from the engine's."""

    @property
    def data(self) -> torch.Tensor:
        """[layer][k, v][slot][token][kv_head][head_dim]"""
        ...

    def read(self, slot: int, tokens: int, out: Bytes) -> None:
        """A slot's first `tokens` tokens, packed, into `out`."""
        ...

    def write(self, slot: int, tokens: int, source: Bytes) -> None: ...

    def copy(self, source: int, target: int, tokens: int) -> None:
        """A slot's first `tokens` tokens into another slot, behind the work issued so far. The engine's
        thread alone."""
        ...

    def begin_read(self, slots: Sequence[int]) -> BlockRead:
        """Whole blocks, as they are behind the work issued so far."""
        ...


class KVPool:
    """KV of `n_slots` blocks. The engine thread computes in it; a full block that is kept may be copied out
    by any thread, and a slot of nobody else's be filled by any."""

    def __init__(self, layout: KVLayout, n_slots: int, storage: PoolStorage | None = None) -> None:
        self.layout = layout
        self.n_slots = n_slots
        self._storage = storage if storage is not None else HostStorage(layout, n_slots)
        data = self._storage.data
        self._flat = data.view(layout.layers, 2, n_slots * layout.block_tokens, *data.shape[-2:])

    @property
    def layouts(self) -> tuple[KVLayout, ...]:
        """Of each rank's part of a block outside: the parts stand one behind the other."""
        return (self.layout,)

    @property
    def hot(self) -> str:
        """What KV is held as: `model`, its own dtype; or the codec of engine/quantised_pool.py."""
        return "model"

    @property
    def quality(self) -> Quality:
        """The most that KV of this pool, and what is computed over it, may claim to be."""
        return Quality.LOSSLESS

    @property
    def dtype(self) -> torch.dtype:
        """Of KV outside the pool."""
        return self._flat.dtype

    @property
    def device(self) -> torch.device:
        return self._flat.device

    @property
    def data(self) -> torch.Tensor:
        """[layer][k, v][slot][token][kv_head][head_dim]"""
        flat = self._flat
        return flat.view(*flat.shape[:2], self.n_slots, self.layout.block_tokens, *flat.shape[3:])

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What kernels read: keys, values, and the scales of each (here there are none: anything)."""
        keys, values = self.keys(layer), self.values(layer)
        return keys, values, keys, values

    def keys(self, layer: int) -> torch.Tensor:
        """View [slots * block_tokens, kv_heads, head_dim]: token t of slot s is row s * block_tokens + t."""
        return self._flat[layer, 0]

    def values(self, layer: int) -> torch.Tensor:
        return self._flat[layer, 1]

    def write(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One layer's K and V [len(rows), kv_heads, head_dim] of new tokens, at `rows` (int64) of `keys`."""
        self.keys(layer).index_copy_(0, rows, keys)
        self.values(layer).index_copy_(0, rows, values)

    def token_index(self, slots: Sequence[int], begin: int, end: int) -> torch.Tensor | slice:
        """Rows of `keys` that hold positions begin .. end of the sequence in `slots`; a slice if adjacent."""
        size = self.layout.block_tokens
        first, taken = begin // size, slots[begin // size : -(-end // size)]
        skip, count = begin - first * size, end - begin
        if all(slot == taken[0] + i for i, slot in enumerate(taken)):
            row = taken[0] * size + skip
            return slice(row, row + count)
        rows = torch.tensor(taken).unsqueeze(1) * size + torch.arange(size)
        return rows.flatten()[skip : skip + count]

    @property
    def block_nbytes(self) -> int:
        return self.layout.block_nbytes

    def read_block(self, slot: int) -> Bytes:
        """A copy of one block in the frame's layout: uint8 [block_nbytes]."""
        return self.read_tail(slot, self.layout.block_tokens)

    def begin_read(self, slots: Sequence[int]) -> BlockRead:
        """Copies of blocks, not waited for."""
        return self._storage.begin_read(slots)

    def copy_out(self, slot: int, out: Bytes) -> None:
        """One block into memory of the caller's."""
        self._storage.read(slot, self.layout.block_tokens, out)

    def write_block(self, slot: int, payload: memoryview | Bytes) -> None:
        """Fill a slot from a verified payload. ValueError unless it has exactly block_nbytes."""
        self.write_tail(slot, payload, self.layout.block_tokens)

    def read_tail(self, slot: int, tokens: int) -> Bytes:
        """A copy of a slot's first `tokens` tokens, packed: uint8 [tokens * token_nbytes]."""
        out: Bytes = np.empty(tokens * self.layout.token_nbytes, np.uint8)
        self._storage.read(slot, tokens, out)
        return out

    def write_tail(self, slot: int, payload: memoryview | Bytes, tokens: int) -> None:
        self._storage.write(slot, tokens, self._checked(payload, tokens))

    def copy_block(self, source: int, target: int, tokens: int) -> None:
        """A slot's first `tokens` tokens into another slot, to the bit of what is held. From the engine's
        thread."""
        self._storage.copy(source, target, tokens)

    def _checked(self, payload: memoryview | Bytes, tokens: int) -> Bytes:
        nbytes = tokens * self.layout.token_nbytes
        source: Bytes = np.frombuffer(payload, dtype=np.uint8)
        if source.nbytes != nbytes or not 0 < tokens <= self.layout.block_tokens:
            raise ValueError(
                f"KV of {tokens} tokens must have {nbytes} bytes in layout {self.layout}, got {source.nbytes}"
            )
        return source


class CopiedBlocks(NamedTuple):
    """Blocks that are out already."""

    payloads: list[Bytes]

    def done(self) -> bool:
        return True

    def take(self) -> list[Bytes]:
        return self.payloads


class HostStorage:
    """Pages of this process, touched as they come into use."""

    def __init__(self, layout: KVLayout, n_slots: int) -> None:
        token_nbytes = layout.token_nbytes // (2 * layout.layers)  # one layer's keys or values
        # numpy's zeros are mapped when first touched (torch's are written: 1.5 s per GiB); as bytes, since
        # numpy neither knows bfloat16 nor minds a read-only source.
        self._bytes: Bytes = np.zeros(
            (layout.layers, 2, n_slots, layout.block_tokens, token_nbytes), np.uint8
        )
        data = torch.from_numpy(self._bytes).view(DTYPES[layout.dtype])
        self.data = data.view(*data.shape[:-1], layout.kv_heads, layout.head_dim)

    def read(self, slot: int, tokens: int, out: Bytes) -> None:
        source = self._bytes[:, :, slot, :tokens]
        out.reshape(source.shape)[...] = source

    def write(self, slot: int, tokens: int, source: Bytes) -> None:
        target = self._bytes[:, :, slot, :tokens]
        target[...] = source.reshape(target.shape)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self._bytes[:, :, target, :tokens] = self._bytes[:, :, source, :tokens]

    def begin_read(self, slots: Sequence[int]) -> BlockRead:
        return CopiedBlocks([self._bytes[:, :, slot].reshape(-1).copy() for slot in slots])
