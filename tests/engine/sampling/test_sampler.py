"""A draw is a pure function of logits, params, seed and position: of nothing else, and without bias."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.rows import NO_TOKEN, SamplingRow
from engine.sampling.sampler import Sampler, draw
from engine.types import SamplingParams

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1, **fields)


def sample(logits: torch.Tensor, wanted: Sequence[SamplingParams], positions: Iterable[int]) -> list[int]:
    """Tokens of sequences that are as long as the positions say."""
    asked = [
        SamplingRow(one, range(position), position) for one, position in zip(wanted, positions, strict=True)
    ]
    return [drawn.token_id for drawn in Sampler.sample(logits, asked)]


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def draws(logits: list[float], count: int, **fields: Any) -> Counter[int]:
    """Tokens drawn from one row at positions 0 .. count - 1."""
    rows = torch.tensor([logits]).expand(count, -1)
    return Counter(sample(rows, [params(**fields)] * count, range(count)))


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id() -> None:
    logits = torch.full((3, 50_000), -1.0)
    logits[0, [40_000, 123, 7_777]] = 5.0
    logits[1, 49_999] = 0.0
    assert sample(logits, [GREEDY] * 3, [0, 1, 2]) == [123, 49_999, 0]


def test_top_k_of_one_is_greedy_whatever_the_noise() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert {sample(logits, [params(top_k=1, seed=s)], [s])[0] for s in range(50)} == {1}


def test_temperature_sharpens() -> None:
    logits = [math.log(p) for p in (0.4, 0.6)]
    share = 0.6**2 / (0.6**2 + 0.4**2)
    assert draws(logits, 5_000, temperature=0.5)[1] / 5_000 == pytest.approx(share, abs=0.02)
    assert draws(logits, 200, temperature=1e-6) == Counter({1: 200})
    assert draws([*logits, -math.inf], 200, temperature=1e-300) == Counter({1: 200})


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1}),  # the token that crosses top_p is kept
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),  # of the three's own 0.85: 0.47, then 0.82
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_k": 0, "top_p": 1.0}, {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_and_top_p_keep_what_they_say(fields: dict[str, float], kept: set[int]) -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]
    assert set(draws(logits, 400, **fields)) == kept


def test_ties_at_the_edge_of_top_k_go_to_the_lowest_ids() -> None:
    assert set(draws([0.0] * 10, 300, top_k=3)) == {0, 1, 2}
    assert set(draws([0.0] * 10, 300, top_p=0.25)) == {0, 1, 2}


def test_a_nucleus_wider_than_the_first_look_is_whole() -> None:
    """Of 4,000 equal tokens, half the probability is 2,000 of them: beyond what is sorted first."""
    drawn = draws([0.0] * 4_000, 3_000, top_p=0.5)
    assert max(drawn) in range(1_900, 2_000)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_nucleus_begins_and_ends_where_its_definition_says(top_p: float, scale: float) -> None:
    """Narrow and wide: the least and the greatest uniform draw its lowest and its highest id."""
    logits = scale * random_logits(1, 5_000)[0]
    weights = logits.double().softmax(0)
    ranked = weights.argsort(descending=True, stable=True)
    size = int((weights[ranked].cumsum(0) < top_p).sum()) + 1
    nucleus = ranked[:size].tolist()
    ends = [draw(logits.numpy(), params(top_p=top_p), noise) for noise in (0.0, 1.0 - 2.0**-53)]
    assert ends == [min(nucleus), max(nucleus)]


def test_equal_tokens_share_the_noise_evenly_over_all_blocks() -> None:
    logits = np.zeros(1_024, np.float32)
    for token in (0, 1, 255, 256, 257, 700, 768, 1_023):
        assert draw(logits, params(), (token + 0.5) / 1_024) == token


def test_masked_tokens_are_never_drawn() -> None:
    assert set(draws([-math.inf, 0.0, -math.inf, 0.0, -math.inf], 300)) == {1, 3}


def test_the_last_uniform_before_one_draws_the_last_token_of_any_weight() -> None:
    row = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float32).numpy()
    assert draw(row, params(), 1.0 - 2.0**-53) == 1
    assert draw(row, params(), 0.0) == 0


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0]), min_size=1, max_size=700),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_by_blocks_is_a_draw_one_by_one(weights: list[float], noise: float) -> None:
    """In exact numbers: at the first of a row of equal sums, and never at a weight of nothing."""
    weights[len(weights) // 2] = 1.0
    logits = torch.tensor(weights).log().numpy()
    drawn = draw(logits, params(), noise)
    kept = np.exp(logits - logits.max()).astype(np.float64)
    before, target = math.fsum(kept[:drawn]), noise * math.fsum(kept)
    assert kept[drawn] > 0
    assert before <= target * (1 + 1e-12)
    assert target <= (before + kept[drawn]) * (1 + 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.permutations(range(6)), st.integers(1, 6))
def test_a_row_does_not_know_its_batch(seed: int, order: list[int], count: int) -> None:
    logits = random_logits(6, 2_000, seed)
    wanted = [
        GREEDY,
        params(seed=seed),
        params(seed=seed, top_k=40),
        params(seed=seed, top_p=0.9),
        params(seed=seed, top_k=100, top_p=0.5, temperature=0.7, min_p=0.01, logprobs=3),
        params(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.2, logit_bias=((7, 5.0),)),
    ]
    asked = [SamplingRow(one, range(10 + i), 5) for i, one in enumerate(wanted)]
    alone = [Sampler.sample(logits[i : i + 1], asked[i : i + 1])[0] for i in range(6)]
    rows = order[:count]
    assert Sampler.sample(logits[rows], [asked[i] for i in rows]) == [alone[i] for i in rows]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("wanted", [GREEDY, params()])
def test_a_row_of_nonsense_is_told_and_spoils_no_other(bad: float, wanted: SamplingParams) -> None:
    logits = torch.zeros(2, 10)
    logits[0, 3] = bad
    logits[1, 4] = 50.0
    assert sample(logits, [wanted] * 2, [0, 0]) == [NO_TOKEN, 4]
    assert sample(torch.full((1, 10), -math.inf), [wanted], [0]) == [NO_TOKEN]


def test_lengths_that_differ_are_our_callers_mistake() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        sample(torch.zeros(2, 4), [GREEDY], [0])
