"""Promise 5 under vLLM: greedy output is the same with and without the connector, computed, loaded by the
engine that stored it, and loaded by another process; and what was loaded is what could be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.engines import VllmEngine, engine
from tests.vllm.prompts import LENGTHS, loadable, prompt, prompts
from tests.vllm.stores import Store, store
from tests.vllm.transfer import ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SMALL_BLOCK = 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with store(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(scope="module")
def first(tiny: Path, shared: Store) -> Iterator[VllmEngine]:
    with engine(tiny, ours(shared, min_load_tokens=0)) as started:
        yield started


@pytest.fixture(scope="module")
def second(tiny: Path, shared: Store) -> Iterator[VllmEngine]:
    """Another process, whose blocks are of another size."""
    with engine(tiny, ours(shared, min_load_tokens=0), block_size=SMALL_BLOCK) as started:
        yield started


def test_twenty_prompts_cold_then_from_the_store(plain: VllmEngine, first: VllmEngine, shared: Store) -> None:
    asked = prompts(LENGTHS, seed=1)
    expected = [answer.tokens for answer in plain.generate(asked)]
    cold = first.generate(asked)
    assert [answer.tokens for answer in cold] == expected
    assert [answer.cached for answer in cold] == [0] * len(asked)
    shared.until_versions(sum((length + 7) // 32 for length in LENGTHS))
    first.forget()
    hit = first.generate(asked)
    assert [answer.tokens for answer in hit] == expected
    for answer, length in zip(hit, LENGTHS, strict=True):
        assert answer.cached >= loadable(length, first.block_size), f"{length} tokens"
    shared.until_idle()


def test_a_second_process_hits_what_the_first_stored(
    plain: VllmEngine, first: VllmEngine, second: VllmEngine, shared: Store
) -> None:
    asked = prompts(LENGTHS, seed=2)
    before = shared.status()["versions"]
    expected = [answer.tokens for answer in first.generate(asked)]
    shared.until_versions(before + sum((length + 7) // 32 for length in LENGTHS))
    hit = second.generate(asked)
    assert [answer.tokens for answer in hit] == expected
    assert expected == [answer.tokens for answer in plain.generate(asked)]
    for answer, length in zip(hit, LENGTHS, strict=True):
        assert answer.cached >= loadable(length, SMALL_BLOCK), f"{length} tokens"
    shared.until_idle()


def test_a_longer_prompt_goes_on_from_a_stored_one(
    plain: VllmEngine, first: VllmEngine, second: VllmEngine, shared: Store
) -> None:
    """The answer of a turn is part of the next one's prompt, and what follows differs."""
    before = shared.status()["versions"]
    (turn,) = first.generate([prompt(200, seed=3)], tokens=70)
    shared.until_versions(before + 269 // 32)
    longer = [*prompt(200, seed=3), *turn.tokens, *prompt(50, seed=4)]
    (hit,) = second.generate([longer])
    (expected,) = plain.generate([longer])
    assert hit.tokens == expected.tokens
    assert hit.cached == 256


def test_a_salted_prompt_is_another_prompt(
    plain: VllmEngine, first: VllmEngine, second: VllmEngine, shared: Store
) -> None:
    asked = [prompt(300, seed=5)]
    before = shared.status()["versions"]
    expected = [answer.tokens for answer in plain.generate(asked)]
    first.generate(asked, salt="one tenant of vLLM's")
    shared.until_versions(before + 307 // 32)
    (other,) = second.generate(asked)
    (same,) = second.generate(asked, salt="one tenant of vLLM's")
    assert (other.cached, same.cached) == (0, loadable(300, SMALL_BLOCK))
    assert [other.tokens, same.tokens] == expected * 2
