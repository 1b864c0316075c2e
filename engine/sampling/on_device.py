"""The next tokens drawn where the logits are: the same rule as sampler.py, all rows at once, one copy back.

    weight     exp((logit - highest) / temperature), float64
    threshold  the logit of the last candidate that min_p, top_k and top_p leave, found among the 1,024
               highest, and how many of those equal to it are left: the first by id
    draw       cumulative weight in the order of ids; the first that exceeds u * total

What lies beyond the 1,024 highest (a nucleus of nearly everything), and rows that ask for more than
temperature, min_p, top_k and top_p (penalties, constraints, logprobs), go to the sampler on the CPU: a row is
drawn by one rule wherever it is drawn. Sums are added in another order than there, so u * total may fall on
the other side of a boundary: about 1e-16 of a token's draws times the size of the vocabulary. Greedy is
exact.

A few dozen launches a batch; nothing waits until the tokens are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from engine.device import Device
from engine.sampling.device_noise import uniforms
from engine.sampling.rows import NO_TOKEN, Drawn, SamplingRow
from engine.sampling.sampler import Sampler
from engine.types import SamplingParams

__all__ = ["DeviceSampler", "draw_here"]

RANKED_MAX: Final = 1024
"""How many of the highest logits are sorted."""
_NOT_HERE: Final = -3
"""A row whose candidates are not all among the ranked ones."""
_WORD: Final = 0xFFFFFFFF

_COLUMNS: Final = ("temperature", "min_p", "top_k", "top_p", "seed_low", "seed_high", "position")


class DeviceSampler:
    """One runner's, of the engine's thread."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def begin(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Callable[[], list[Drawn]]:
        """Begin to draw a token a row of `logits` (float32 [rows, vocabulary], on the device). The answer
        waits for the tokens; `logits` must stay what they are until then."""
        if not rows or not all(row.is_plain for row in rows):
            return lambda: Sampler.sample(logits, rows)
        with torch.inference_mode(), self._device.current():
            tokens = self._tokens(logits, rows)
            pinned = self._device.pinned(tokens.nbytes).view(torch.int64)
            pinned.copy_(tokens, non_blocking=True)
            mark = self._device.mark()

        def take() -> list[Drawn]:
            mark.synchronize()
            drawn = [Drawn(token) for token in pinned.tolist()]
            for index, (token, _) in enumerate(drawn):
                if token == _NOT_HERE:
                    drawn[index] = Sampler.sample(logits[index : index + 1], [rows[index]])[0]
            return drawn

        return take

    def _tokens(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        highest, greedy = torch.max(logits, dim=-1)
        if any(row.params.temperature > 0 for row in rows):
            columns = np.array([_columns(row) for row in rows]).T
            pinned = self._device.pinned(columns.nbytes).view(torch.float64).view(*columns.shape)
            pinned.numpy()[...] = columns
            there = pinned.to(logits.device, non_blocking=True)
            ranked = any(_is_cut(row.params) for row in rows)
            drawn = draw_here(logits, highest, dict(zip(_COLUMNS, there, strict=True)), ranked=ranked)
            greedy = torch.where(there[0] > 0, drawn, greedy)
        return torch.where(torch.isfinite(highest), greedy, NO_TOKEN)


def _is_cut(params: SamplingParams) -> bool:
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1.0)


def _columns(row: SamplingRow) -> tuple[float, ...]:
    """In the order of _COLUMNS; whole numbers are below 2**53 and exact."""
    params, seed = row.params, row.params.seed
    top_k = max(params.top_k, 0)
    cuts = params.temperature, params.min_p, top_k, params.top_p
    return (*cuts, seed & _WORD, seed >> 32 & _WORD, len(row.tokens))


def draw_here(
    logits: torch.Tensor, highest: torch.Tensor, columns: dict[str, torch.Tensor], *, ranked: bool
) -> torch.Tensor:
    """int64 [rows]: the token of each, or _NOT_HERE. `columns` are float64 [rows]; `highest` finite, or the
    row's answer is of no use. `ranked`: some row has a top_k or top_p."""
    temperature = columns["temperature"]
    scaled = (logits.double() - highest.unsqueeze(1)) / temperature.where(temperature > 0, 1.0).unsqueeze(1)
    weights = scaled.exp_()
    likely = weights >= columns["min_p"].unsqueeze(1)
    beyond = None
    if ranked:
        left, beyond = _left_of_ranking(logits, highest, weights, likely, columns)
        likely &= left
    weights = weights * likely
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    key = columns["seed_low"].long(), columns["seed_high"].long()
    noise = uniforms(key, columns["position"].long()).unsqueeze(1)
    index = torch.searchsorted(cumulative, noise * total, right=True)
    # Rounding may carry noise * total up to the total itself: then the last token of any weight.
    last = logits.shape[1] - 1 - (weights > 0).flip(1).int().argmax(1, keepdim=True)
    tokens = torch.minimum(index, last).squeeze(1)
    return tokens if beyond is None else tokens.where(~beyond, _NOT_HERE)


def _left_of_ranking(
    logits: torch.Tensor,
    highest: torch.Tensor,
    weights: torch.Tensor,
    likely: torch.Tensor,
    columns: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens top_k and top_p leave (bool [rows, vocabulary]; what min_p forbids may be among them), and
    for which rows that is not known (bool [rows])."""
    vocabulary = logits.shape[1]
    top = torch.topk(logits, min(RANKED_MAX, vocabulary), dim=1).values
    temperature = columns["temperature"]
    scale = temperature.where(temperature > 0, 1.0).unsqueeze(1)
    cumulative = ((top.double() - highest.unsqueeze(1)) / scale).exp_().cumsum(1)
    n_likely = likely.sum(1).double()
    top_k = columns["top_k"]
    cut_by_k = (top_k > 0) & (top_k < n_likely)
    # Of the likely ones, so many by top_k; what these have together.
    k = torch.where(cut_by_k, top_k, n_likely)
    inside = k.clamp(1, top.shape[1]).long()  # 0: of a row that is not finite
    first_k = cumulative.gather(1, inside.sub(1).unsqueeze(1)).squeeze(1)
    total = torch.where(k <= top.shape[1], first_k, (weights * likely).sum(1))
    wanted = columns["top_p"] * total
    cut_by_p = columns["top_p"] < 1.0
    # The token that crosses top_p belongs to the nucleus.
    crossed = (cumulative < wanted.unsqueeze(1)).sum(1) + 1
    count = torch.where(cut_by_p, torch.minimum(crossed, inside), inside)
    beyond = (k > top.shape[1]) & (cut_by_k | (cut_by_p & (first_k < wanted)))
    threshold = top.gather(1, count.sub(1).unsqueeze(1))
    above = logits > threshold
    level = logits == threshold
    left = above | (level & (level.cumsum(1) <= count.unsqueeze(1) - above.sum(1, keepdim=True)))
    everything = ~cut_by_p & (k > top.shape[1])
    return left | everything.unsqueeze(1), beyond
