"""Noise is a pure function of (seed, position), even, and pinned for good; so are the seeds of choices."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.noise import choice_seed, philox4x32, uniform

ONES = 0xFFFFFFFF


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


def test_the_first_choice_has_the_requests_seed_and_no_two_share_one() -> None:
    assert choice_seed(7, 0) == 7
    seeds = {choice_seed(seed, choice) for seed in range(50) for choice in range(128)}
    assert len(seeds) == 50 * 128
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_the_seeds_of_choices_are_pinned() -> None:
    """A request that is sent again gets the same choices, also from another version."""
    assert [choice_seed(0, 1), choice_seed(7, 3)] == [16812882865779656009, 12817212174936871303]
