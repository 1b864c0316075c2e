"""A pool that holds KV as codes: half the bytes of bfloat16, so twice the tokens, and lossy from the start.

    codes    [layer][k, v][slot][token][kv_head][head_dim]     one byte each: e4m3 or int8 numbers
    scales   [layer][k, v][slot][kv_head][token]               bfloat16, one a token and head; a head's
                                                               scales of a block are one piece of memory

The formulas are those of the codecs int8 and fp8 (kvstore/codecs), so a hot block has lost exactly what a
block loses that goes through them, and `quality` is theirs: whatever leaves this pool, and whatever was
computed over it, claims no more. Outside, a block is a frame's payload in the layout's dtype all the same.

Tokens are quantised as they are written, each by itself, so what attention reads does not depend on how a
prompt was chunked. Triton's kernels read codes (`held`); for backends in torch `keys` and `values` make a
copy of the whole layer: right everywhere, and slow but for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from engine.config import HOT_QUALITIES
from engine.pool import BlockRead, Bytes, CopiedBlocks, KVPool
from engine.weights import DTYPES
from kvstore.codecs.exact import reciprocals, scales
from kvstore.nouns import KVLayout, Quality

__all__ = ["CODE_MAX", "QuantisedPool", "dequantised", "held_nbytes", "make_pool", "quantised"]

CODE_MAX: Final = {"int8": 127, "fp8": 448}
_FLOAT16_MAX: Final = 65504.0


class QuantisedPool(KVPool):
    """See the module. `hot` is `int8` or `fp8`; for everything else see KVPool."""

    def __init__(self, layout: KVLayout, n_slots: int, hot: str, device: torch.device | None = None) -> None:
        self.layout = layout
        self.n_slots = n_slots
        self._hot = hot
        self._dtype = DTYPES[layout.dtype]
        shape = (layout.layers, 2, n_slots, layout.block_tokens, layout.kv_heads, layout.head_dim)
        by_head = (*shape[:3], layout.kv_heads, layout.block_tokens)
        if device is None or device.type == "cpu":
            self.codes = torch.from_numpy(np.zeros(shape, np.int8))  # mapped when first touched
            self.scales = torch.from_numpy(np.zeros(by_head, np.int16)).view(torch.bfloat16)
        else:
            self.codes = torch.zeros(shape, dtype=torch.int8, device=device)
            self.scales = torch.zeros(by_head, dtype=torch.bfloat16, device=device)

    @property
    def hot(self) -> str:
        return self._hot

    @property
    def quality(self) -> Quality:
        return HOT_QUALITIES[self._hot]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, scales_of = self.codes[layer], self.scales[layer]
        return codes[0], codes[1], scales_of[0], scales_of[1]

    def keys(self, layer: int) -> torch.Tensor:
        """A copy, dequantised. What is written into it goes nowhere: `write` does that."""
        return self._layer(layer, 0)

    def values(self, layer: int) -> torch.Tensor:
        return self._layer(layer, 1)

    def write(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.device.type == "cuda":
            from engine.attention.triton_copy import write_rows  # which imports this

            write_rows(self, layer, rows, keys, values)
            return
        slots, tokens = rows // self.layout.block_tokens, rows % self.layout.block_tokens
        for which, of_rows in enumerate((keys, values)):
            codes, scale = quantised(of_rows, self._hot)
            self.codes[layer, which, slots, tokens] = codes
            self.scales[layer, which, slots, :, tokens] = scale.to(torch.bfloat16)

    def copy_out(self, slot: int, out: Bytes) -> None:
        out.reshape(-1)[...] = self.read_block(slot)

    def begin_read(self, slots: Sequence[int]) -> BlockRead:
        """Waited for: they are dequantised on the way."""
        return CopiedBlocks([self.read_block(slot) for slot in slots])

    def read_tail(self, slot: int, tokens: int) -> Bytes:
        codes = self.codes[:, :, slot, :tokens]
        scale = self.scales[:, :, slot, :, :tokens].transpose(2, 3)
        payload = dequantised(codes, scale, self._hot, self._dtype).contiguous()
        found: Bytes = payload.view(torch.uint8).flatten().cpu().numpy()
        return found

    def write_tail(self, slot: int, payload: memoryview | Bytes, tokens: int) -> None:
        source = self._checked(payload, tokens)
        layout = self.layout
        shape = (layout.layers, 2, tokens, layout.kv_heads, layout.head_dim)
        values = torch.from_numpy(source.copy()).view(self._dtype).view(shape).to(self.device)
        codes, scale = quantised(values, self._hot)
        self.codes[:, :, slot, :tokens] = codes
        self.scales[:, :, slot, :, :tokens] = scale.to(torch.bfloat16).transpose(2, 3)

    def _layer(self, layer: int, which: int) -> torch.Tensor:
        scale = self.scales[layer, which].transpose(1, 2)
        return dequantised(self.codes[layer, which], scale, self._hot, self._dtype).flatten(0, 1)


def held_nbytes(layout: KVLayout, hot: str) -> int:
    """Bytes of a block in a pool of this kind."""
    if hot == "model":
        return layout.block_nbytes
    vectors = 2 * layout.layers * layout.block_tokens * layout.kv_heads
    return vectors * (layout.head_dim + torch.bfloat16.itemsize)


def make_pool(layout: KVLayout, n_slots: int, hot: str) -> KVPool:
    """In this process's memory."""
    return KVPool(layout, n_slots) if hot == "model" else QuantisedPool(layout, n_slots, hot)


def quantised(values: torch.Tensor, hot: str) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [..., head_dim] and float32 scales [...] (each exact in bfloat16). NaN and infinities come
    back as NaN, whatever else there is."""
    x = values.float()
    scale = scales(x.abs().amax(-1), CODE_MAX[hot])
    scaled = x * reciprocals(scale).unsqueeze(-1)
    if hot == "fp8":
        return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.int8), scale
    return scaled.round_().clamp_(-127, 127).to(torch.int8), scale


def dequantised(codes: torch.Tensor, scale: torch.Tensor, hot: str, dtype: torch.dtype) -> torch.Tensor:
    numbers = codes.view(torch.float8_e4m3fn) if hot == "fp8" else codes
    values = numbers.float().mul_(scale.float().unsqueeze(-1))
    if dtype is torch.float16:
        values.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
    return values.to(dtype)
