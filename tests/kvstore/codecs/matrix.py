"""Layouts and payloads that every codec meets."""

from __future__ import annotations

import numpy as np
import torch

from kvstore.codecs import CODECS, Codec
from kvstore.nouns import KVLayout

LAYOUTS = [
    KVLayout(2, 0, 2, 64, "float32"),
    KVLayout(1, 1, 4, 64, "bfloat16"),
    KVLayout(2, 0, 1, 128, "float16"),
    KVLayout(1, 0, 2, 32, "float32", 16),
]
LOSSY: list[Codec] = [codec for codec in CODECS.values() if codec.number]
PAIRS = [(codec, layout) for codec in LOSSY for layout in LAYOUTS if codec.fits(layout)]


def kv_like(layout: KVLayout, seed: int = 0) -> torch.Tensor:
    """Float32 that looks like KV: keys with channels of great and steady values, a few great values."""
    draw = torch.Generator().manual_seed(seed)
    shape = (layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    kv = torch.randn(shape, generator=draw)
    channels = torch.randn((layout.layers, 1, layout.kv_heads, layout.head_dim), generator=draw)
    kv[:, 0] = kv[:, 0] * (0.2 + channels.abs()) + 4 * channels
    kv[0, 1, 0, 0, 0] = 30.0
    return kv


def payload_of(kv: torch.Tensor, layout: KVLayout) -> memoryview:
    """Read-only bytes, as they come from a mapped arena."""
    cast = kv.to(getattr(torch, layout.dtype)).contiguous()
    return memoryview(cast.view(torch.uint8).numpy().tobytes())


def kv_of(payload: memoryview, layout: KVLayout) -> torch.Tensor:
    copy = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
    shape = (layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    return copy.view(getattr(torch, layout.dtype)).view(shape)


def encoded(codec: Codec, layout: KVLayout, payload: memoryview) -> memoryview:
    made = codec.encode(layout, payload)
    assert made is not None
    assert made.nbytes == codec.encoded_nbytes(layout)
    return made


def decoded(codec: Codec, layout: KVLayout, encoded: memoryview) -> memoryview:
    out = memoryview(bytearray(b"\xa5" * layout.block_nbytes))
    codec.decode(layout, encoded, out)
    return out
