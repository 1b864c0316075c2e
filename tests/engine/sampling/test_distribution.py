"""What is drawn follows the probabilities that a request's parameters define, each and together.

Chi-square with fixed seeds against probabilities worked out here, in float64, by the definitions alone.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from engine.sampling.rows import SamplingRow
from engine.sampling.sampler import Sampler
from engine.types import SamplingParams

LOGITS = [2.1, -0.3, 1.7, 0.4, -1.2, 0.9, 1.1, -0.8, 0.0, 1.5, 0.6, -0.1]
PROMPT = [0, 2, 2, 5]
OUTPUT = [2, 9, 9, 9, 1]
ENDS = frozenset({6, 10})
COUNT = 3_000

ALONE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.3},
    {"presence_penalty": -0.9},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.5},
    {"logit_bias": ((4, 3.0), (0, -2.0), (99, 50.0))},
    {"min_tokens": 6},
]
TOGETHER: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_p": 0.9, "top_k": 7, "min_p": 0.08},
    {"temperature": 1.4, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"min_tokens": 9, "logit_bias": ((6, 100.0), (7, 4.0)), "top_k": 4, "repetition_penalty": 1.2},
    {
        "temperature": 0.9,
        "frequency_penalty": 1.1,
        "logit_bias": ((9, 3.0), (11, 1.0)),
        "min_p": 0.05,
        "top_p": 0.95,
        "min_tokens": 6,
    },
]


def probabilities(wanted: SamplingParams) -> list[float]:
    """By the definitions, in the order they are documented in."""
    values = [*LOGITS]
    counts, biases = Counter(OUTPUT), dict(wanted.logit_bias)
    for token in range(len(values)):
        if token in ENDS and len(OUTPUT) < wanted.min_tokens:
            values[token] = -math.inf
        values[token] += biases.get(token, 0.0)
        if token in PROMPT or token in OUTPUT:
            values[token] *= wanted.repetition_penalty if values[token] < 0 else 1 / wanted.repetition_penalty
        values[token] -= wanted.frequency_penalty * counts[token]
        values[token] -= wanted.presence_penalty * (counts[token] > 0)
    weights = [math.exp(value / wanted.temperature) for value in values]
    weights = [weight if weight >= wanted.min_p * max(weights) else 0.0 for weight in weights]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = [token for token in ranked[: wanted.top_k or None] if weights[token] > 0]
    total = math.fsum(weights[token] for token in kept)
    nucleus, held = [], 0.0
    for token in kept:
        if held >= wanted.top_p * total:
            break
        nucleus.append(token)
        held += weights[token]
    return [weights[token] / held if token in nucleus else 0.0 for token in range(len(weights))]


def critical(freedom: int) -> float:
    """The 99.9 % point of chi-square, by Wilson and Hilferty's approximation."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("fields", [*ALONE, *TOGETHER], ids=lambda fields: "+".join(fields) or "none")
def test_draws_follow_the_defined_probabilities(fields: dict[str, Any]) -> None:
    wanted = SamplingParams(max_tokens=99, **fields)
    expected = probabilities(wanted)
    rows = [
        SamplingRow(SamplingParams(max_tokens=99, seed=seed, **fields), PROMPT + OUTPUT, len(PROMPT), ENDS)
        for seed in range(COUNT)
    ]
    drawn = Counter(one.token_id for one in Sampler.sample(torch.tensor([LOGITS]).expand(COUNT, -1), rows))
    assert all(expected[token] > 0 for token in drawn), "a token was drawn that may not be"
    usual = [token for token, p in enumerate(expected) if COUNT * p >= 5]
    statistic = math.fsum((drawn[t] - COUNT * expected[t]) ** 2 / (COUNT * expected[t]) for t in usual)
    assert len(usual) >= 4
    assert statistic < critical(len(usual) - 1)


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"repetition_penalty": 1.8}, {"temperature": 0.6}])
def test_the_test_would_see_a_parameter_that_does_nothing(fields: dict[str, Any]) -> None:
    plain, meant = probabilities(SamplingParams(1)), probabilities(SamplingParams(1, **fields))
    apart = math.fsum((a - b) ** 2 / b for a, b in zip(meant, plain, strict=True))
    assert COUNT * apart > 2 * critical(len(LOGITS))
