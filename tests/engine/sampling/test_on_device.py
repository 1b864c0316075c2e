"""Promise: a token drawn where the logits are is the token that the CPU's sampler draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.device import HostDevice
from engine.sampling import device_noise, on_device
from engine.sampling.noise import philox4x32, uniform
from engine.sampling.on_device import DeviceSampler
from engine.sampling.rows import NO_TOKEN, Drawn, SamplingRow
from engine.sampling.sampler import Sampler
from engine.types import SamplingParams

HERE = DeviceSampler(HostDevice())


def row(params: SamplingParams, position: int) -> SamplingRow:
    return SamplingRow(params, range(position), 1)


def mixed_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
        top_k=int(rng.choice([0, 0, 1, 7, 50, 5000])),
        top_p=float(rng.choice([1.0, 1.0, 0.1, 0.9, 0.999])),
        min_p=float(rng.choice([0.0, 0.0, 0.02, 0.3])),
        seed=int(rng.integers(-(2**63), 2**63)),
    )


def ids(drawn: list[Drawn]) -> list[int]:
    return [one.token_id for one in drawn]


def test_words_and_uniforms_are_the_cpus() -> None:
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**64 - 1, -1, *map(int, rng.integers(-(2**63), 2**63, 200))]
    positions = [0, 2**31, 2**32 - 1, 2**40 + 3, *map(int, rng.integers(0, 2**48, 200))]
    keys = [(seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF) for seed in seeds]
    counters = [(at & 0xFFFFFFFF, at >> 32, 7, 0xFFFFFFFF) for at in positions]
    c0, c1, c2, c3 = torch.tensor(counters).T
    low, high = torch.tensor(keys).T
    words = torch.stack(device_noise.philox4x32((c0, c1, c2, c3), (low, high))).T.tolist()
    assert words == [list(philox4x32(c, k)) for c, k in zip(counters, keys, strict=True)]
    noise = device_noise.uniforms((low, high), torch.tensor(positions)).tolist()
    assert noise == [uniform(seed, at) for seed, at in zip(seeds, positions, strict=True)]


@pytest.mark.parametrize("vocabulary", [40, 3000])
def test_ten_thousand_draws_of_mixed_parameters_are_the_cpus(vocabulary: int) -> None:
    """Equal logits are among them: a row's values are rounded to quarters."""
    rng = np.random.default_rng(vocabulary)
    for batch in range(50):
        logits = torch.from_numpy(rng.normal(0, 3, (100, vocabulary)).astype(np.float32))
        logits[::2] = logits[::2].mul(4).round().div(4)
        rows = [row(mixed_params(rng), 1 + batch * 100 + at) for at in range(100)]
        assert ids(HERE.begin(logits, rows)()) == ids(Sampler.sample(logits, rows))


def test_of_equal_logits_the_first_ids_are_left() -> None:
    logits = torch.zeros(4, 5000)
    logits[1, 100:] = 1.0
    params = SamplingParams(max_tokens=1, temperature=1.0, top_k=3)
    for seed in range(40):
        rows = [row(replace(params, seed=seed), at) for at in range(1, 5)]
        drawn = ids(HERE.begin(logits, rows)())
        assert drawn == ids(Sampler.sample(logits, rows))
        assert drawn[1] in (100, 101, 102)
        assert max(drawn[0], *drawn[2:]) < 3


def test_a_nucleus_beyond_the_ranked_ones_is_drawn_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "RANKED_MAX", 16)
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 0.1, (64, 500)).astype(np.float32))
    params = [replace(mixed_params(rng), temperature=1.0) for _ in range(64)]
    rows = [row(one, 1 + at) for at, one in enumerate(params)]
    asked: list[int] = []
    sample = Sampler.sample

    def counted(logits: torch.Tensor, rows: list[SamplingRow]) -> list[Drawn]:
        asked.append(len(rows))
        return sample(logits, rows)

    monkeypatch.setattr(Sampler, "sample", staticmethod(counted))
    drawn = HERE.begin(logits, rows)()
    assert ids(drawn) == ids(sample(logits, rows))
    assert 0 < len(asked) < 64, "some rows are beyond the ranked ones, and not all"


def test_rows_without_a_finite_logit_have_no_token() -> None:
    logits = torch.zeros(3, 50)
    logits[0] = -torch.inf
    logits[1, 7] = torch.nan
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    for params in (greedy, replace(greedy, temperature=1.0, top_k=5, top_p=0.5)):
        rows = [row(params, at) for at in range(1, 4)]
        assert ids(HERE.begin(logits, rows)())[:2] == [NO_TOKEN, NO_TOKEN]
        assert ids(HERE.begin(logits, rows)()) == ids(Sampler.sample(logits, rows))


def test_what_is_not_asked_for_draws_nothing() -> None:
    assert HERE.begin(torch.empty(0, 50), [])() == []
