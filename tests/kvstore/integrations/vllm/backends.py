"""Attention backends as vLLM has them, and worse: each lays out its pool in its own way and does not say how.

A backend makes pools `[blocks, ...]` and writes keys and values of tokens into the slots it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], None]
"""(pool, key, value of one token [kv_head, head_dim], block, token in the block)."""
Make = Callable[[int, int, int, int, torch.dtype], torch.Tensor]
"""(blocks, block_tokens, kv_heads, head_dim, dtype) -> a pool."""


@dataclass
class Backend:
    name: str
    make: Make
    write: Write
    served: bool = True


class Impl:
    def __init__(self, backend: Backend, block_tokens: int) -> None:
        self.backend = backend
        self.block_tokens = block_tokens

    def do_kv_cache_update(
        self,
        _layer: object,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        for row, slot in enumerate(slot_mapping.tolist()):
            self.backend.write(kv_cache, key[row], value[row], *divmod(slot, self.block_tokens))


@dataclass
class Layer:
    impl: Any
    num_kv_heads: int
    head_size: int
    sliding_window: int | None = None


def layer_of(backend: Backend, block_tokens: int, heads: int, dim: int) -> Layer:
    return Layer(Impl(backend, block_tokens), heads, dim)


def _nhd(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    pool[block, 0, token], pool[block, 1, token] = key, value


def _first_axis(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    pool[0, block, token], pool[1, block, token] = key, value


def _fused(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    """[blocks, kv_heads, tokens, 2 x head_dim], as vLLM's GPU backends have it from 0.32 on."""
    pool[block, :, token] = torch.cat((key, value), dim=-1)


def _transposed_keys(
    pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int
) -> None:
    """As vLLM's CPU backend with AVX2: of each head first K as [head_dim, tokens], then V as it is."""
    heads, tokens, twice = pool.shape[1:]
    flat = pool[block].view(heads, 2, tokens * twice // 2)
    flat[:, 0].view(heads, twice // 2, tokens)[:, :, token] = key
    flat[:, 1].view(heads, tokens, twice // 2)[:, token] = value


def _packed_keys(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    """As for AMX: K in groups of 16 tokens, pairs of channels; V in pairs of tokens."""
    heads, tokens, twice = pool.shape[1:]
    dim = twice // 2
    flat = pool[block].view(heads, 2, tokens * dim)
    keys = flat[:, 0].view(heads, tokens // 16, dim // 2, 16, 2)
    keys[:, token // 16, :, token % 16] = key.view(heads, dim // 2, 2)
    flat[:, 1].view(heads, tokens // 2, dim, 2)[:, token // 2, :, token % 2] = value


def _swizzled(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    """The head's place depends on the token: no strides say so."""
    heads = key.shape[0]
    turned = (torch.arange(heads) + token) % heads
    pool[block, 0, token, turned], pool[block, 1, token, turned] = key, value


def _halved(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    _nhd(pool, key / 2, value / 2, block, token)


def _forgetful(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    _nhd(pool, key, key, block, token)


def _careless(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, token: int) -> None:
    _nhd(pool, key, value, block, token)
    pool[block - 1, 0, 0, 0, 0] = 1


def _plain(blocks: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(blocks, 2, tokens, heads, dim, dtype=dtype)


def _kv_first(blocks: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(2, blocks, tokens, heads, dim, dtype=dtype)


def _hnd(blocks: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(blocks, 2, heads, tokens, dim, dtype=dtype).transpose(2, 3)


def _head_major(blocks: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(blocks, heads, tokens, 2 * dim, dtype=dtype)


def _token_major(blocks: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(blocks, tokens, heads, 2 * dim, dtype=dtype).transpose(1, 2)


BACKENDS = [
    Backend("nhd", _plain, _nhd),
    Backend("hnd", _hnd, _nhd),
    Backend("kv-first", _kv_first, _first_axis),
    Backend("fused-hnd", _head_major, _fused),
    Backend("fused-nhd", _token_major, _fused),
    Backend("transposed-keys", _head_major, _transposed_keys),
    Backend("packed-keys", _head_major, _packed_keys),
]
REFUSED = {
    "strides of token, head": Backend("swizzled", _plain, _swizzled, served=False),
    "scaled, quantised": Backend("halved", _plain, _halved, served=False),
    "exactly once": Backend("forgetful", _plain, _forgetful, served=False),
    "other blocks": Backend("careless", _plain, _careless, served=False),
}
