"""Promise 3 under vLLM: weights change 17 times under a running engine, in place and from folders, and no
answer rests on KV of other weights; nothing is flushed, and each set of weights hits its own blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import Epoch, digest16
from kvstore.sync import StoreClient
from tests.tiny_model import make_tiny_model
from tests.vllm.engines import VllmEngine, engine
from tests.vllm.prompts import loadable, prompts
from tests.vllm.stores import Store, store
from tests.vllm.transfer import MODEL_ID, ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

EPOCHS = 17
LENGTHS = (300, 129, 256)
BLOCKS = sum((length + 7) // 32 for length in LENGTHS)


class Trainer:
    """Says which weights count from now on, as whoever changes them has to."""

    def __init__(self, shared: Store) -> None:
        self._client = StoreClient.connect_to([shared.admin], token=shared.token, admin=True)
        self._number = 0

    def advance(self, weights: str) -> None:
        self._number += 1
        self._client.register_epoch(MODEL_ID, Epoch(self._number, digest16(weights)))
        self._client.advance_epoch(MODEL_ID, self._number)

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with store(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(scope="module")
def trainer(shared: Store) -> Iterator[Trainer]:
    started = Trainer(shared)
    yield started
    started.close()


@pytest.fixture(scope="module")
def trained(tiny: Path, shared: Store, trainer: Trainer) -> Iterator[VllmEngine]:
    trainer.advance("as in the folder")
    with engine(tiny, ours(shared, epoch="store")) as started:
        yield started


@pytest.fixture
def one(trained: VllmEngine, plain: VllmEngine, trainer: Trainer) -> Iterator[VllmEngine]:
    """At the folder's weights, in an epoch of its own."""
    trainer.advance("as in the folder")
    trained.perturb(0)
    trained.reset()
    yield trained
    plain.perturb(0)


def test_seventeen_epochs_in_place(
    plain: VllmEngine, one: VllmEngine, shared: Store, trainer: Trainer
) -> None:
    asked = prompts(LENGTHS, seed=50)
    before = shared.status()["versions"]
    one.generate(asked)
    shared.until_versions(before + BLOCKS)
    said = set()
    for seed in range(1, EPOCHS + 1):
        for changed in (one, plain):
            changed.perturb(seed)
        trainer.advance(f"seed {seed}")
        one.reset()
        expected = [answer.tokens for answer in plain.generate(asked)]
        cold = one.generate(asked)
        assert [answer.tokens for answer in cold] == expected, f"epoch {seed}"
        assert [answer.cached for answer in cold] == [0] * len(asked), f"epoch {seed}: a stale hit"
        shared.until_versions(before + (seed + 1) * BLOCKS)  # of all epochs: nothing was flushed
        one.forget()
        again = one.generate(asked)
        assert [answer.tokens for answer in again] == expected, f"epoch {seed}, from the store"
        assert [answer.cached for answer in again] == [loadable(n, one.block_size) for n in LENGTHS]
        said.add(tuple(expected))
    assert len(said) == EPOCHS, "weights that say the same prove nothing"


def test_weights_loaded_from_folders(tiny: Path, tmp_path: Path, one: VllmEngine, trainer: Trainer) -> None:
    """By vLLM's own reload, and back to weights that were there before."""
    asked = prompts(LENGTHS, seed=51)
    other = make_tiny_model(tmp_path / "other", seed=7, hidden_size=128, head_dim=32)
    at_first = [answer.tokens for answer in one.generate(asked)]
    one.reload(other)
    trainer.advance("other")
    one.reset()
    then = one.generate(asked)
    assert [answer.cached for answer in then] == [0] * len(asked)
    one.reload(tiny)
    trainer.advance("tiny again")
    one.reset()
    last = one.generate(asked)
    assert [answer.tokens for answer in last] == at_first
    assert [answer.cached for answer in last] == [0] * len(asked)
    assert [answer.tokens for answer in then] != at_first


def test_a_request_that_lived_before_publishes_nothing_after(
    plain: VllmEngine, one: VllmEngine, trainer: Trainer
) -> None:
    """What it computes rests on both weights; the same prompt asked anew rests on the new ones alone."""
    (asked,) = prompts((300,), seed=52)
    one.add([asked], 100)
    assert one.step(20, {})
    for changed in (one, plain):
        changed.perturb(1)
    trainer.advance("seed 1")
    one.reset(running=True)
    one.finish()
    one.forget()
    (expected,) = plain.generate([asked])
    (fresh,) = one.generate([asked])
    assert (fresh.tokens, fresh.cached) == (expected.tokens, 0)


def test_an_engine_whose_epoch_is_its_files_shares_nothing_after_a_reset(
    plain: VllmEngine, tiny: Path, tmp_path: Path
) -> None:
    """Nobody can say what it computes with: it hits what itself stored since, and nobody hits that."""
    asked = prompts(LENGTHS, seed=53)
    with store(tmp_path) as shared, engine(tiny, ours(shared)) as one:
        one.generate(asked)
        shared.until_versions(BLOCKS)
        for changed in (one, plain):
            changed.perturb(2)
        one.reset()
        expected = [answer.tokens for answer in plain.generate(asked)]
        cold = one.generate(asked)
        assert [answer.tokens for answer in cold] == expected
        assert [answer.cached for answer in cold] == [0] * len(asked)
        plain.perturb(0)
        with engine(tiny, ours(shared)) as unchanged:
            answers = unchanged.generate(asked)
            assert [a.tokens for a in answers] == [a.tokens for a in plain.generate(asked)]
            assert [a.cached for a in answers] == [loadable(n, unchanged.block_size) for n in LENGTHS]
