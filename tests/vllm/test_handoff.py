"""Promise 5 under vLLM: prefill in one process and decode in another say what one process says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.engines import VllmEngine, engine
from tests.vllm.prompts import EDGES, loadable, prompt, prompts
from tests.vllm.stores import Store, store
from tests.vllm.transfer import ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

ASKED_OF_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with store(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(scope="module")
def prefill(tiny: Path, shared: Store) -> Iterator[VllmEngine]:
    with engine(tiny, ours(shared, role="kv_producer", handoff_timeout_s=5.0)) as started:
        yield started


@pytest.fixture(scope="module")
def decode(tiny: Path, shared: Store) -> Iterator[VllmEngine]:
    with engine(tiny, ours(shared, role="kv_consumer", min_load_tokens=0, handoff_timeout_s=5.0)) as started:
        yield started


def test_two_processes_equal_one(plain: VllmEngine, prefill: VllmEngine, decode: VllmEngine) -> None:
    """Decode is asked at once: it waits for what is on its way to the store."""
    asked = prompts(EDGES, seed=10)
    expected = plain.generate(asked, tokens=20)
    for one, wanted in zip(asked, expected, strict=True):
        (given,) = prefill.generate([one], tokens=1, params=ASKED_OF_PREFILL)
        assert given.tokens == wanted.tokens[:1]
        assert given.params is not None
        before = decode.counted("hit_tokens")  # what vLLM calls cached is what prefill had cached
        (answer,) = decode.generate([one], tokens=20, params=given.params)
        assert answer.tokens == wanted.tokens
        assert decode.counted("hit_tokens") - before == loadable(len(one), decode.block_size), len(one)


def test_decode_computes_what_never_comes(plain: VllmEngine, decode: VllmEngine, prefill: VllmEngine) -> None:
    """The parameters of another prompt are of no use: the tokens that are asked for decide."""
    (given,) = prefill.generate([prompt(300, seed=11)], tokens=1, params=ASKED_OF_PREFILL)
    other = prompt(300, seed=12)
    (expected,) = plain.generate([other])
    (answer,) = decode.generate([other], params=given.params)
    assert (answer.tokens, answer.finish) == (expected.tokens, "length")


def test_a_consumer_saves_nothing_and_a_producer_loads_nothing(
    prefill: VllmEngine, decode: VllmEngine, shared: Store
) -> None:
    shared.until_idle()
    before = shared.status()["versions"]
    decode.generate([prompt(300, seed=13)])
    decode.generate([prompt(300, seed=14)])
    prefill.generate([prompt(300, seed=15)])
    shared.until_versions(before + 9)
    assert shared.status()["versions"] == before + 9  # 307 tokens of the producer's one
    prefill.forget()
    (again,) = prefill.generate([prompt(300, seed=15)])
    assert again.cached == 0
