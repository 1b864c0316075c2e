"""Promise 1 under vLLM: whatever becomes of the store, under `recompute` the answer is the same, under `fail`
it is an error that says so, nothing hangs, and the engine serves on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.vllm.engines import Answer, VllmEngine, engine
from tests.vllm.prompts import loadable, prompt, prompts
from tests.vllm.stores import Store, store
from tests.vllm.transfer import ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

IMPATIENT: dict[str, Any] = {
    "lookup_timeout_s": 1.0,
    "load_timeout_s": 2.0,
    "connect_timeout_s": 2.0,
    "save_timeout_s": 5.0,
}
LENGTHS = (300, 129, 513)
READ = "storage.read"
AGAIN_S = 30.0


@pytest.fixture(scope="module", params=[False, True], ids=["grpc", "shm"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with store(tmp_path_factory.mktemp("store"), shared_memory=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def patient(tiny: Path, shared: Store) -> Iterator[VllmEngine]:
    with engine(tiny, ours(shared, policy="recompute", **IMPATIENT)) as started:
        yield started


@pytest.fixture(scope="module")
def strict(tiny: Path, shared: Store) -> Iterator[VllmEngine]:
    with engine(tiny, ours(shared, policy="fail", **IMPATIENT)) as started:
        yield started


def stored(one: VllmEngine, shared: Store, seed: int) -> tuple[list[list[int]], list[Answer]]:
    """Prompts that lie in the store and nowhere in vLLM, and the answers they had. Another test may have
    killed the store a moment ago, and the connector tries again in its own time."""
    served_again(one, shared, seed=5000 + seed)
    asked = prompts(LENGTHS, seed)
    before = shared.status()["versions"]
    answers = one.generate(asked)
    shared.until_versions(before + sum((length + 7) // 32 for length in LENGTHS))
    one.forget()
    return asked, answers


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def until_held(one: VllmEngine, shared: Store, answers: dict[str, Answer]) -> None:
    """Step until the store stands still in the middle of a load."""
    for _ in range(2000):
        assert one.step(4, answers), "finished before the store was asked for its fourth block"
        if shared.status()["met"].get(READ):
            return
    raise AssertionError("nothing was read")


class TestRecompute:
    def test_killed_in_the_middle_of_a_load_then_started_again(
        self, plain: VllmEngine, patient: VllmEngine, shared: Store
    ) -> None:
        if shared.maps_memory:
            pytest.skip("what readers map outlives the store: only over gRPC is there a middle")
        asked, cold = stored(patient, shared, seed=20)
        assert tokens(cold) == tokens(plain.generate(asked))
        shared.arm(READ, "hold", after=3, times=1000)
        answers: dict[str, Answer] = {}
        ids = patient.add(asked, 8)
        until_held(patient, shared, answers)
        shared.kill()
        answers |= patient.finish()
        assert [answers[i].tokens for i in ids] == tokens(cold)
        shared.start()

    def test_it_is_served_from_a_store_that_came_back(self, patient: VllmEngine, shared: Store) -> None:
        shared.kill()
        asked = [prompt(300, seed=21)]
        (gone,) = patient.generate(asked)
        assert gone.finish == "length"
        shared.start()
        patient.forget()
        served_again(patient, shared, seed=22)

    def test_slow_in_a_look_up(self, patient: VllmEngine, shared: Store) -> None:
        asked, cold = stored(patient, shared, seed=23)
        shared.pause()
        answers = patient.generate(asked)
        shared.resume()
        assert tokens(answers) == tokens(cold)
        assert [answer.cached for answer in answers] == [0] * len(asked)
        patient.forget()
        served_again(patient, shared, seed=24)

    def test_slow_in_a_load(self, patient: VllmEngine, shared: Store) -> None:
        if shared.maps_memory:
            pytest.skip("what readers map is read without asking the store")
        asked, cold = stored(patient, shared, seed=25)
        shared.arm(READ, "hold", after=3, times=1000)
        answers = patient.generate(asked)
        shared.disarm(READ)
        assert tokens(answers) == tokens(cold)
        patient.forget()
        served_again(patient, shared, seed=26)

    def test_a_byte_is_broken_where_it_lies(self, patient: VllmEngine, shared: Store) -> None:
        asked, cold = stored(patient, shared, seed=27)
        shared.flip()
        again = patient.generate(asked)
        assert tokens(again) == tokens(cold)
        shared.until_idle()

    def test_bytes_break_on_the_way(self, patient: VllmEngine, shared: Store) -> None:
        if shared.maps_memory:
            pytest.skip("there is no way: the reader copies")
        asked, cold = stored(patient, shared, seed=28)
        shared.arm(READ, "corrupt", after=2, times=3)
        again = patient.generate(asked)
        shared.disarm(READ)
        assert tokens(again) == tokens(cold)
        assert sum(answer.cached for answer in again) < sum(loadable(n, patient.block_size) for n in LENGTHS)
        shared.until_idle()


class TestFail:
    def test_killed_in_the_middle_of_a_load(self, strict: VllmEngine, shared: Store) -> None:
        if shared.maps_memory:
            pytest.skip("what readers map outlives the store: only over gRPC is there a middle")
        asked, _ = stored(strict, shared, seed=30)
        shared.arm(READ, "hold", after=3, times=1000)
        answers: dict[str, Answer] = {}
        ids = strict.add(asked, 8)
        until_held(strict, shared, answers)
        shared.kill()
        answers |= strict.finish()
        assert "error" in {answers[i].finish for i in ids}
        shared.start()
        strict.forget()
        served_again(strict, shared, seed=31)

    def test_a_broken_block_ends_its_own_request_alone(self, strict: VllmEngine, shared: Store) -> None:
        asked, cold = stored(strict, shared, seed=32)
        shared.flip()
        answers = strict.generate(asked)
        for answer, expected in zip(answers, cold, strict=True):
            assert answer.finish == "error" or answer.tokens == expected.tokens
        assert [answer.finish for answer in answers].count("error") <= 1
        shared.until_idle()

    def test_a_store_that_is_away_fails_nobody(self, strict: VllmEngine, shared: Store) -> None:
        """Nothing was promised by a look-up, so there is nothing to fail."""
        asked, cold = stored(strict, shared, seed=33)
        shared.kill()
        answers = strict.generate(asked)
        shared.start()
        assert tokens(answers) == tokens(cold)
        strict.forget()
        served_again(strict, shared, seed=34)


def test_a_full_store_serves_what_it_can(plain: VllmEngine, tiny: Path, tmp_path: Path) -> None:
    """Room for some 8 blocks, and twelve times as many come: what does not fit is a later miss."""
    asked = prompts((300, 301, 302, 303, 304, 305, 306, 307, 308, 309), seed=40)
    expected = tokens(plain.generate(asked))
    with store(tmp_path, capacity_nbytes=300_000) as small, engine(tiny, ours(small)) as one:
        for _ in range(3):
            assert tokens(one.generate(asked)) == expected
            one.forget()
        small.until_idle()
        assert 0 < small.status()["versions"] <= 9


def served_again(one: VllmEngine, shared: Store, seed: int) -> None:
    """What is computed now is stored, and hit: within the time that the connector takes to try again."""
    asked = [prompt(300, seed)]
    (cold,) = one.generate(asked)
    deadline = monotonic() + AGAIN_S
    while monotonic() < deadline:
        one.forget()
        (again,) = one.generate(asked)
        assert again.tokens == cold.tokens
        if again.cached:
            return
    raise AssertionError(f"a store that is back was not used within {AGAIN_S} s")
