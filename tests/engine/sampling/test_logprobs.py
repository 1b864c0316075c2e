"""Logprobs are log softmax of the logits as the model gave them, whatever shaped the draw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from engine.sampling.rows import SamplingRow
from engine.sampling.sampler import Sampler, logprobs_of
from engine.types import SamplingParams

VOCABULARY = 3_000


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 5 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def row(logprobs: int | None, **fields: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(9, logprobs=logprobs, **fields), [1, 2, 2, 3], 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_p": 0.5, "repetition_penalty": 1.5, "logit_bias": ((17, 100.0),)},
    ],
)
def test_they_are_those_of_the_raw_distribution(fields: dict[str, Any]) -> None:
    values = logits(8)
    before = values.clone()
    drawn = Sampler.sample(values, [row(4, seed=seed, **fields) for seed in range(8)])
    expected = torch.log_softmax(before.double(), dim=-1)
    for one, row_expected in zip(drawn, expected, strict=True):
        assert one.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(row_expected[one.token_id].item(), abs=1e-6)
        best = row_expected.topk(4)
        assert one.logprobs.top_ids == tuple(best.indices.tolist())
        assert one.logprobs.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-6)
    assert torch.equal(values, before), "the logits are the caller's"


def test_asking_changes_no_draw_and_none_come_unasked() -> None:
    values = logits(4)
    asked = Sampler.sample(values, [row(0, seed=seed) for seed in range(4)])
    bare = Sampler.sample(values, [row(None, seed=seed) for seed in range(4)])
    assert [one.token_id for one in asked] == [one.token_id for one in bare]
    assert [one.logprobs for one in bare] == [None] * 4
    assert all(one.logprobs is not None and one.logprobs.top_ids == () for one in asked)


def test_of_equals_the_lowest_id_comes_first_and_a_masked_token_is_minus_infinity() -> None:
    raw = np.zeros(6, np.float32)
    raw[5] = -math.inf
    told = logprobs_of(raw, 3, 2)
    assert told.top_ids == (0, 1)
    assert told.logprob == pytest.approx(-math.log(5))
    assert logprobs_of(raw, 5, 0).logprob == -math.inf
