"""Penalties, biases and held-back ends are what they are defined as, in their order."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from engine.sampling.adjust import Floats, LogitAdjuster
from engine.types import SamplingParams

VOCABULARY = 500
END = frozenset({2, 7})


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=99, **fields)


def random_logits(seed: int = 0) -> Floats:
    return (3 * np.random.default_rng(seed).standard_normal(VOCABULARY)).astype(np.float32)


def adjusted(wanted: SamplingParams, tokens: Sequence[int], prompt_len: int, seed: int = 0) -> Floats:
    logits = random_logits(seed)
    LogitAdjuster(wanted, prompt_len, END).apply(logits, tokens)
    return logits


def defined(wanted: SamplingParams, tokens: Sequence[int], prompt_len: int, seed: int = 0) -> list[float]:
    """The module's table, one token at a time, in float64."""
    output, biases, answer = Counter(tokens[prompt_len:]), dict(wanted.logit_bias), []
    for token_id, logit in enumerate(random_logits(seed).tolist()):
        value = logit
        if len(tokens) - prompt_len < wanted.min_tokens and token_id in END:
            value = -math.inf
        value += biases.get(token_id, 0.0)
        if token_id in tokens:
            value *= wanted.repetition_penalty if value <= 0 else 1 / wanted.repetition_penalty
        value -= wanted.frequency_penalty * output[token_id]
        value -= wanted.presence_penalty * (token_id in output)
        answer.append(value)
    return answer


def test_repetition_is_transformers_bit_for_bit() -> None:
    tokens = random.Random(1).choices(range(VOCABULARY), k=300)
    for penalty in (1.3, 0.7, 2.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([tokens]), torch.from_numpy(random_logits())[None]
        )
        ours = adjusted(params(repetition_penalty=penalty), tokens, prompt_len=200)
        assert np.array_equal(ours, expected[0].numpy())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60),
    st.integers(1, 60),
    st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.5, 1.0, 1.2, 3.0]),
            "presence_penalty": st.floats(-2, 2, width=16),
            "frequency_penalty": st.floats(-2, 2, width=16),
            "min_tokens": st.integers(0, 60),
            "logit_bias": st.dictionaries(st.integers(0, VOCABULARY + 9), st.floats(-100, 100)).map(
                lambda biases: tuple(biases.items())
            ),
        },
    ),
)
def test_all_together_are_what_the_table_says(
    tokens: list[int], prompt_len: int, fields: dict[str, Any]
) -> None:
    prompt_len = min(prompt_len, len(tokens))
    ours = adjusted(params(**fields), tokens, prompt_len)
    assert np.allclose(ours, defined(params(**fields), tokens, prompt_len), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 8), st.booleans())
def test_counts_that_grew_are_those_counted_anew(data: st.DataObject, prompt_len: int, seen: bool) -> None:
    """Token by token, with guesses in between that are taken back: the same bits as from nothing."""
    wanted = params(
        repetition_penalty=1.3 if seen else 1.0, presence_penalty=0.4, frequency_penalty=0.3, min_tokens=4
    )
    some = st.integers(0, 11)
    tokens = data.draw(st.lists(some, min_size=prompt_len, max_size=prompt_len))
    kept = LogitAdjuster(wanted, prompt_len, END)
    for step in range(12):
        for drafts in (0, *data.draw(st.lists(st.integers(1, 4), max_size=2))):
            guessed = [*tokens, *data.draw(st.lists(some, min_size=drafts, max_size=drafts))]
            logits = random_logits(step)
            kept.apply(logits, guessed, drafts)
            assert np.array_equal(logits, adjusted(wanted, guessed, prompt_len, step))
        tokens.extend(data.draw(st.lists(some, min_size=1, max_size=3)))


def test_a_long_output_of_new_tokens_is_counted_whole() -> None:
    wanted, tokens = params(presence_penalty=1.0), [0]
    kept = LogitAdjuster(wanted, 1, ())
    for token_id in range(VOCABULARY):
        tokens.append(token_id)
        logits = random_logits()
        kept.apply(logits, tokens)
    assert np.array_equal(logits, random_logits() - np.float32(1.0))


def test_tokens_taken_back_without_a_word_are_our_callers_mistake() -> None:
    kept = LogitAdjuster(params(presence_penalty=1.0), 1, ())
    kept.apply(random_logits(), [1, 2, 3])
    with pytest.raises(ValueError, match="drafts"):
        kept.apply(random_logits(), [1, 2])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"temperature": 0.3, "top_p": 0.5, "min_p": 0.1, "stop_token_ids": (4,)}, False),
        ({"min_tokens": 1}, True),
        ({"logit_bias": ((4, 1.0),)}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
    ],
)
def test_it_knows_what_needs_it(fields: dict[str, Any], expected: bool) -> None:
    assert LogitAdjuster.changes_anything(params(**fields)) is expected
    if not expected:
        assert np.array_equal(adjusted(params(**fields), [1, 2, 3], 1), random_logits())
