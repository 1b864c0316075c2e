"""The noise of draws on tensors: engine/sampling's Philox, a row each, on any device.

Words are 32 bits in int64: a product of two wraps as a signed number does, and its bits are the same.
Philox4x32-10: Salmon et al., SC'11.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["philox4x32", "uniforms"]

_WORD: Final = 0xFFFFFFFF
_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four words a row, int64, of counters and keys of words. Some 100 small kernels."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & _WORD) ^ c1 ^ k0,
            high & _WORD,
            (low >> 32 & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniforms(seeds: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1), 53 bits: of seeds as (low, high) words and positions below 2**63, int64 each."""
    nothing = torch.zeros_like(positions)
    words = philox4x32((positions & _WORD, positions >> 32, nothing, nothing), seeds)
    return (words[0] << 21 | words[1] >> 11).double() * 2.0**-53
