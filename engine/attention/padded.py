"""Decode attention over tables of one shape, in plain torch: what a graph can record without Triton.

Every row reads as many tokens as the table has room for, whatever its context, so a recorded step serves any
contexts; what it costs is that, too. The way of last resort on a device, and what graphs are tested with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.attention.base import Windows, hidden_tokens
from engine.attention.sdpa import SdpaAttention
from engine.pool import KVPool

__all__ = ["PaddedAttention"]


class PaddedAttention(SdpaAttention):
    """Steps of any shape as its parent does them."""

    def decode_plan(self, tables: torch.Tensor, positions: torch.Tensor, pool: KVPool) -> PaddedPlan:
        """For rows of one token each: see PagedDecode."""
        return PaddedPlan(self._windows, self._sinks, tables, positions, pool)


class PaddedPlan:
    def __init__(
        self, windows: Windows, sinks: int, tables: torch.Tensor, positions: torch.Tensor, pool: KVPool
    ) -> None:
        self._windows = windows
        self._pool = pool
        size = pool.layout.block_tokens
        offsets = torch.arange(size, device=tables.device)
        self._index = (tables.long().unsqueeze(-1) * size + offsets).flatten(1)  # [rows, tokens]
        tokens = torch.arange(self._index.shape[1], device=tables.device)
        self._hidden = {
            window: hidden_tokens(positions.unsqueeze(1), tokens, window, sinks) for window in set(windows)
        }

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        hidden = self._hidden[self._windows[layer]]
        keys = self._read(self._pool.keys(layer), hidden)
        result = F.scaled_dot_product_attention(
            queries.unsqueeze(2),
            keys,
            self._read(self._pool.values(layer), hidden),
            attn_mask=~hidden[:, None, None],
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        out.copy_(result.squeeze(2))

    def _read(self, flat: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, kv_heads, tokens, head_dim]. Zeros where there is nothing of the row's: what another owner
        left there may be NaN, and a weight of zero would not stop it."""
        return flat[self._index].masked_fill(hidden[:, :, None, None], 0).transpose(1, 2)
