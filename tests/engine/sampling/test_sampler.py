"""A draw is a pure function of logits, params, seed and position: of nothing else, and without bias."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.rows import NO_TOKEN, SamplingRow
from engine.sampling.sampler import Sampler, draw, philox4x32, uniform
from engine.types import SamplingParams

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
ONES = 0xFFFFFFFF


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


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == words


def test_the_noise_of_a_token_is_pinned() -> None:
    """Sequences go on elsewhere by it, perhaps under another version: it never changes."""
    assert [uniform(0, 0), uniform(7, 1000), uniform(2**63, 2**40)] == [
        0.3990464708489645,
        0.08992361249471137,
        0.37363312735113585,
    ]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**63))
def test_noise_is_in_its_range_for_any_seed(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed % 2**64, position)


def test_noise_is_uniform_over_positions_and_over_seeds() -> None:
    """Chi-square of 20 bins over 20,000 draws: 43.8 is the 99.9 % point of 19 degrees of freedom."""
    for values in ([uniform(1, p) for p in range(20_000)], [uniform(s, 1) for s in range(20_000)]):
        bins = Counter(int(value * 20) for value in values)
        assert sum((bins[b] - 1000) ** 2 / 1000 for b in range(20)) < 43.8


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id() -> None:
    logits = torch.full((3, 50_000), -1.0)
    logits[0, [40_000, 123, 7_777]] = 5.0
    logits[1, 49_999] = 0.0
    assert sample(logits, [GREEDY] * 3, [0, 1, 2]) == [123, 49_999, 0]


def test_top_k_of_one_is_greedy_whatever_the_noise() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert {sample(logits, [params(top_k=1, seed=s)], [s])[0] for s in range(50)} == {1}


def test_frequencies_follow_the_probabilities() -> None:
    """Chi-square with a fixed seed: 18.5 is the 99.9 % point of 4 degrees of freedom."""
    probabilities = [0.4, 0.3, 0.15, 0.1, 0.05]
    count = 20_000
    drawn = draws([math.log(p) for p in probabilities], count, seed=11)
    statistic = sum((drawn[i] - count * p) ** 2 / (count * p) for i, p in enumerate(probabilities))
    assert statistic < 18.5


def test_temperature_sharpens() -> None:
    logits = [math.log(p) for p in (0.4, 0.6)]
    share = 0.6**2 / (0.6**2 + 0.4**2)
    assert draws(logits, 5_000, temperature=0.5)[1] / 5_000 == pytest.approx(share, abs=0.02)
    assert draws(logits, 200, temperature=1e-6) == Counter({1: 200})


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


def test_masked_tokens_are_never_drawn() -> None:
    assert set(draws([-math.inf, 0.0, -math.inf, 0.0, -math.inf], 300)) == {1, 3}


def test_the_last_uniform_before_one_draws_the_last_token_of_any_weight() -> None:
    row = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64).numpy()
    assert draw(row, params(), 1.0 - 2.0**-53) == 1
    assert draw(row, params(), 0.0) == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.permutations(range(6)), st.integers(1, 6))
def test_a_row_does_not_know_its_batch(seed: int, order: list[int], count: int) -> None:
    logits = random_logits(6, 2_000, seed)
    wanted = [
        GREEDY,
        params(seed=seed),
        params(seed=seed, top_k=40),
        params(seed=seed, top_p=0.9),
        params(seed=seed, top_k=100, top_p=0.5, temperature=0.7),
        params(seed=seed + 1),
    ]
    alone = [sample(logits[i : i + 1], [wanted[i]], [10 + i])[0] for i in range(6)]
    rows = order[:count]
    together = sample(logits[rows], [wanted[i] for i in rows], [10 + i for i in rows])
    assert together == [alone[i] for i in rows]


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
