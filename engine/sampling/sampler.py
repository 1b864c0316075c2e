"""Which token comes next: greedy, or drawn with noise that is a pure function of (seed, position).

A sequence that moves to another worker, or is computed again after a failure, draws the same tokens: there
is no generator state, only one uniform a token (`engine/sampling/noise.py`). And a row's result does not
depend on the batch it is in: each is drawn by itself, in float64, from its own logits and tokens alone.

    allow     what the row's constraint does not forbid
    adjust    min_tokens, logit_bias, penalties, in float32 (`engine/sampling/adjust.py`)
    keep      of the probabilities at the temperature: those of at least min_p times the highest; of these the
              top_k highest; of these the smallest set that holds top_p of what they have together; equal
              logits go by id, lowest first
    draw      candidates in the order of their ids; the first whose cumulative weight exceeds u * total

At temperature 0 the highest adjusted logit, of equals the lowest id. Logprobs are of the logits as the model
gave them, before any of this and at temperature 1: what OpenAI's API means, and vLLM's default.

Greedy costs an argmax for all rows together. A drawn row costs about 0.8 ms for a vocabulary of 50k; 6 ms if
the nucleus is nearly all of it.
Nucleus sampling: arXiv:1904.09751. Min-p: arXiv:2407.01082.
"""

from __future__ import annotations

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
"""How many of the highest logits are sorted first: nearly always they hold the nucleus."""

Floats = npt.NDArray[np.float64]
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
            elif row.is_argmax:
                drawn.append(Drawn(highest_id))
            else:
                drawn.append(_drawn(logits[index].to("cpu", torch.float32).numpy(), row))
        return drawn


def _drawn(raw: npt.NDArray[np.float32], row: SamplingRow) -> Drawn:
    """One row's, whose highest logit is finite. `raw` is not changed."""
    params, logits = row.params, _adjusted(raw, row)
    if logits is not raw and not np.isfinite(logits.max()):
        return Drawn(NOTHING_ALLOWED)
    if params.temperature > 0:
        token_id = draw(logits.astype(np.float64), params, uniform(params.seed, len(row.tokens)))
    else:
        token_id = int(np.argmax(logits))
    return Drawn(token_id, None if params.logprobs is None else logprobs_of(raw, token_id, params.logprobs))


def _adjusted(raw: npt.NDArray[np.float32], row: SamplingRow) -> npt.NDArray[np.float32]:
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


def logprobs_of(raw: npt.NDArray[np.float32], token_id: int, top: int) -> TokenLogprobs:
    """Log softmax of a row (float32 [vocabulary]): of the token, and of the `top` highest."""
    logits = raw.astype(np.float64)
    highest = logits.max()
    normaliser = highest + np.log(np.exp(logits - highest).sum())
    ids = _highest(logits, top) if top else np.empty(0, np.intp)
    return TokenLogprobs(
        float(logits[token_id] - normaliser), tuple(ids.tolist()), tuple((logits[ids] - normaliser).tolist())
    )


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
    """Ids that min_p, top_k and top_p leave; None for all. The highest weight is 1."""
    if params.min_p <= 0.0:
        return _nucleus(logits, weights, params)
    likely = np.flatnonzero(weights >= params.min_p)
    kept = _nucleus(logits[likely], weights[likely], params)
    return likely if kept is None else likely[kept]


def _nucleus(logits: Floats, weights: Floats, params: SamplingParams) -> Ids | None:
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
