"""Which token comes next: greedy, or drawn with noise that is a pure function of (seed, position).

A sequence that moves to another worker, or is computed again after a failure, draws the same tokens: there
is no generator state, only one uniform a token (`engine/sampling/noise.py`). And a row's result does not
depend on the batch it is in: each is drawn by itself, from its own logits and tokens alone.

    allow     what the row's constraint does not forbid
    adjust    min_tokens, logit_bias, penalties, in float32 (`engine/sampling/adjust.py`)
    keep      of the probabilities at the temperature: those of at least min_p times the highest; of these the
              top_k highest; of these the smallest set that holds top_p of what they have together; equal
              logits go by id, lowest first
    draw      candidates in the order of their ids; the first whose cumulative weight exceeds u * total

At temperature 0 the highest adjusted logit, of equals the lowest id. Logprobs are of the logits as the model
gave them, before any of this and at temperature 1: what OpenAI's API means, and vLLM's default.

Weights are float32 (numpy's exp is good to 3 units in the last place there), their sums float64. Greedy costs
an argmax for all rows together. A drawn row costs 0.2 ms for a vocabulary of 50k (0.45 for 150k), with top_p
0.1 more, or 1.4 (4.2) where the nucleus is nearly all of it; logprobs 0.2 (0.6).
Nucleus sampling: arXiv:1904.09751. Min-p: arXiv:2407.01082.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from engine.sampling.adjust import LogitAdjuster
from engine.sampling.constraint import allowed_after
from engine.sampling.noise import uniform
from engine.sampling.rows import NO_TOKEN, NOTHING_ALLOWED, Drawn, SamplingRow
from engine.types import SamplingParams, TokenLogprobs

__all__ = ["Sampler", "draw", "logprobs_of"]

_NUCLEUS_FIRST: Final = 512
"""How many of the highest weights are sorted first: nearly always they hold the nucleus."""
_COLDEST: Final = 1e-30
"""A lower temperature is no number of float32's; nothing but the highest logit has weight long before."""
_BLOCK: Final = 256
"""Weights whose sum is taken before it is known which of them are needed one by one."""

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]


class Sampler:
    """Stateless: here as a name for the seam."""

    @staticmethod
    def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
        """One token a row of `logits` (float32 [rows, vocabulary], any device)."""
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sequences")
        highest, greedy = torch.max(logits, dim=-1)
        finite = torch.isfinite(highest).tolist()
        drawn = []
        for index, (row, highest_id) in enumerate(zip(rows, greedy.tolist(), strict=True)):
            if not finite[index]:
                drawn.append(Drawn(NO_TOKEN))
            elif row.params.temperature <= 0 and row.is_plain:
                drawn.append(Drawn(highest_id))
            else:
                drawn.append(_drawn(logits[index].to("cpu", torch.float32).numpy(), row))
        return drawn


def _drawn(raw: Floats, row: SamplingRow) -> Drawn:
    """One row's, whose highest logit is finite. `raw` is not changed."""
    params, logits = row.params, _adjusted(raw, row)
    if logits is not raw and not np.isfinite(logits.max()):
        return Drawn(NOTHING_ALLOWED)
    if params.temperature > 0:
        token_id = draw(logits, params, uniform(params.seed, len(row.tokens)))
    else:
        token_id = int(np.argmax(logits))
    return Drawn(token_id, None if params.logprobs is None else logprobs_of(raw, token_id, params.logprobs))


def _adjusted(raw: Floats, row: SamplingRow) -> Floats:
    """A changed copy, or `raw` itself where nothing changes it."""
    logits = raw
    if row.constraint is not None:
        drafts = [*row.tokens[len(row.tokens) - row.drafts :]]
        allowed = allowed_after(row.constraint, drafts, raw.size)
        if allowed is not None:
            logits = np.where(allowed, raw, np.float32(-np.inf))
    if LogitAdjuster.changes_anything(row.params):
        logits = raw.copy() if logits is raw else logits
        adjuster = row.adjuster or LogitAdjuster(row.params, row.prompt_len, row.end_token_ids)
        adjuster.apply(logits, row.tokens, row.drafts)
    return logits


def logprobs_of(raw: Floats, token_id: int, top: int) -> TokenLogprobs:
    """Log softmax of a row (float32 [vocabulary]): of the token, and of the `top` highest."""
    highest = raw.max()
    normaliser = float(highest) + math.log(np.exp(raw - highest).sum(dtype=np.float64))
    ids = _highest(raw, top).tolist() if top else []
    return TokenLogprobs(
        float(raw[token_id]) - normaliser, tuple(ids), tuple(float(raw[token]) - normaliser for token in ids)
    )


def draw(logits: Floats, params: SamplingParams, noise: float) -> int:
    """The token of one row (float32 [vocabulary], highest finite) for a uniform in [0, 1)."""
    weights = logits - logits.max()
    with np.errstate(over="ignore"):  # what overflows has no weight either
        np.divide(weights, np.float32(max(params.temperature, _COLDEST)), out=weights)
    np.exp(weights, out=weights)
    kept = _kept(logits, weights, params)
    if kept is None:
        return _pick(weights, noise)
    kept.sort()
    return int(kept[_pick(weights[kept], noise)])


def _pick(weights: Floats, noise: float) -> int:
    """The first index whose cumulative weight exceeds noise * total: first its block, then within it."""
    whole = weights.size - weights.size % _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    cumulative = np.cumsum(np.append(sums, weights[whole:].sum(dtype=np.float64)))
    target = noise * cumulative[-1]
    block = _first_beyond(cumulative, target)
    begin = block * _BLOCK
    within = np.cumsum(weights[begin : begin + _BLOCK], dtype=np.float64)
    return begin + _first_beyond(within, target - (cumulative[block - 1] if block else 0.0))


def _first_beyond(cumulative: npt.NDArray[np.float64], target: float) -> int:
    """Rounding may carry the target up to the total itself: then the last that adds anything."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return min(index, int(np.searchsorted(cumulative, cumulative[-1], side="left")))


def _kept(logits: Floats, weights: Floats, params: SamplingParams) -> Ids | None:
    """Ids that min_p, top_k and top_p leave; None for all. The highest weight is 1."""
    kept: Ids | None = None
    if params.min_p > 0.0:
        kept = np.flatnonzero(weights >= params.min_p)
    if 0 < params.top_k < (weights.size if kept is None else kept.size):
        kept = _highest(logits, params.top_k) if kept is None else kept[_highest(logits[kept], params.top_k)]
    if params.top_p < 1.0:
        kept = (
            _nucleus(weights, params.top_p) if kept is None else kept[_nucleus(weights[kept], params.top_p)]
        )
    return kept


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices of the smallest set of highest weights that holds `top_p` of all. The one that crosses it
    belongs to it, so at least one is always kept."""
    target = top_p * weights.sum(dtype=np.float64)
    ranked = _highest(weights, min(weights.size, _NUCLEUS_FIRST))
    cumulative = np.cumsum(weights[ranked], dtype=np.float64)
    if cumulative[-1] >= target:
        return ranked[: int(np.searchsorted(cumulative, target, side="left")) + 1]
    # A wide one: the weight at its edge by sorting values alone, a tenth of the cost of sorting indices.
    descending = np.sort(weights)[::-1]
    cumulative = np.cumsum(descending, dtype=np.float64)
    size = min(int(np.searchsorted(cumulative, target, side="left")) + 1, weights.size)
    edge = descending[size - 1]
    above, at_edge = np.flatnonzero(weights > edge), np.flatnonzero(weights == edge)
    return np.concatenate((above, at_edge[: size - above.size]))


def _highest(values: Floats, k: int) -> Ids:
    """Indices of the k highest, highest first, equal ones by index."""
    if k < values.size:
        # Take all that tie with the k-th: a partition alone would pick among them as it pleases.
        candidates = np.flatnonzero(values >= np.partition(values, -k)[-k])
    else:
        candidates = np.arange(values.size)
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]
