"""The noise of draws: a counter-based generator (Philox), so that a token's noise has no history.

    counter (position, 0, 0)   the uniform of the token at that position, under the request's seed
    counter (choice, 0, 1)     the seed of one choice of several (n > 1)

Philox4x32-10: Salmon et al., SC'11, "Parallel random numbers: as easy as 1, 2, 3"; golden vectors in
tests/engine/sampling/test_noise.py.
"""

from __future__ import annotations

from typing import Final

__all__ = ["choice_seed", "philox4x32", "uniform"]

_WORD: Final = 0xFFFFFFFF
_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_SEEDS: Final = 1  # the counter's last word when it makes seeds


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = _ROUNDS
) -> tuple[int, int, int, int]:
    """Four random 32-bit words, a bijection of the counter under the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & _WORD, (low >> 32) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The noise of one token: 53 bits in [0, 1). Any whole seed; it counts modulo 2**64."""
    words = philox4x32((position & _WORD, position >> 32 & _WORD, 0, 0), _key(seed))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a request's choice, 64 bits. The first draws what the request alone would draw."""
    if choice == 0:
        return seed
    words = philox4x32((choice & _WORD, choice >> 32 & _WORD, 0, _SEEDS), _key(seed))
    return words[0] << 32 | words[1]


def _key(seed: int) -> tuple[int, int]:
    return seed & _WORD, seed >> 32 & _WORD
