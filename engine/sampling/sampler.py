"""Which token comes next: greedy, or drawn with noise that is a pure function of (seed, position).

A sequence that moves to another worker, or is computed again after a failure, draws the same tokens: there
is no generator state, only one uniform a token from a counter-based generator (Philox). And a row's result
does not depend on the batch it is in: each is drawn by itself, in float64, from its own logits alone.

    keep    the top_k highest logits, then of these the smallest set that holds top_p of the probability;
            equal logits go by id, lowest first
    draw    candidates in the order of their ids; the first whose cumulative weight exceeds u * total

Greedy costs an argmax. A drawn row costs about 0.8 ms for a vocabulary of 50k; 6 ms if the nucleus is
nearly all of it.
Nucleus sampling: arXiv:1904.09751. Philox4x32-10: Salmon et al., SC'11, "Parallel random numbers: as easy
as 1, 2, 3"; golden vectors in tests/engine/sampling/test_sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from engine.sampling.rows import NO_TOKEN, Drawn, SamplingRow
from engine.types import SamplingParams

__all__ = ["Sampler", "draw", "philox4x32", "uniform"]

_WORD: Final = 0xFFFFFFFF
_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_NUCLEUS_FIRST: Final = 512
"""How many of the highest logits are sorted first: nearly always they hold the nucleus."""

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]


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
    """The noise of one token: 53 bits in [0, 1). Any whole seed; it counts modulo 2**64.

    The counter is (position low, position high, 0, 0): the zeros are for noise of other kinds to come.
    """
    words = philox4x32((position & _WORD, position >> 32 & _WORD, 0, 0), (seed & _WORD, seed >> 32 & _WORD))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


class Sampler:
    """Stateless: here as a name for the seam."""

    @staticmethod
    def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
        """One token a row of `logits` (float32 [rows, vocabulary], any device)."""
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sequences")
        highest, greedy = torch.max(logits, dim=-1)
        finite = torch.isfinite(highest).tolist()
        tokens = [token if ok else NO_TOKEN for token, ok in zip(greedy.tolist(), finite, strict=True)]
        for index, row in enumerate(rows):
            if finite[index] and row.params.temperature > 0:
                values = logits[index].to("cpu", torch.float64).numpy()
                tokens[index] = draw(values, row.params, uniform(row.params.seed, len(row.tokens)))
        return [Drawn(token) for token in tokens]


def draw(logits: Floats, params: SamplingParams, noise: float) -> int:
    """The token of one row (float64 [vocabulary], highest finite) for a uniform in [0, 1)."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    kept = _kept(logits, weights, params)
    if kept is not None:
        kept.sort()
        weights = weights[kept]
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, noise * cumulative[-1], side="right"))
    # Rounding may carry noise * total up to the total itself: then the last token of any weight.
    index = min(index, int(np.flatnonzero(weights)[-1]))
    return index if kept is None else int(kept[index])


def _kept(logits: Floats, weights: Floats, params: SamplingParams) -> Ids | None:
    """Ids that top_k and top_p leave; None for all."""
    k = params.top_k if 0 < params.top_k < logits.size else logits.size
    if params.top_p >= 1.0:
        return None if k == logits.size else _highest(logits, k)
    total = weights.sum() if k == logits.size else weights[_highest(logits, k)].sum()
    ranked = _highest(logits, min(k, _NUCLEUS_FIRST))
    cumulative = np.cumsum(weights[ranked])
    if cumulative[-1] < params.top_p * total and ranked.size < k:
        ranked = _highest(logits, k)
        cumulative = np.cumsum(weights[ranked])
    # The token that crosses top_p belongs to the nucleus, so at least one is always kept.
    return ranked[: int(np.searchsorted(cumulative, params.top_p * total, side="left")) + 1]


def _highest(logits: Floats, k: int) -> Ids:
    """Ids of the k highest logits, highest first, equal ones by id."""
    if k < logits.size:
        # Take all that tie with the k-th: a partition alone would pick among them as it pleases.
        candidates = np.flatnonzero(logits >= np.partition(logits, -k)[-k])
    else:
        candidates = np.arange(logits.size)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:k]
