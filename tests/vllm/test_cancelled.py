"""Promise: a request that is given up, whenever that is, leaves no lease, no pin, no staged byte, no slot of
vLLM's behind, and the engine goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.engines import Answer, VllmEngine, engine
from tests.vllm.prompts import loadable, prompt, prompts
from tests.vllm.stores import Store, store
from tests.vllm.transfer import ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

LENGTHS = (300, 129, 513, 256)
READ = "storage.read"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with store(tmp_path_factory.mktemp("store"), shared_memory=False) as running:
        yield running


@pytest.fixture(scope="module")
def one(tiny: Path, shared: Store) -> Iterator[VllmEngine]:
    with engine(tiny, ours(shared, load_timeout_s=5.0)) as started:
        yield started


@pytest.fixture(scope="module")
def asked(one: VllmEngine, shared: Store) -> list[list[int]]:
    """Prompts that lie in the store."""
    known = prompts(LENGTHS, seed=60)
    one.generate(known)
    shared.until_versions(sum((length + 7) // 32 for length in LENGTHS))
    return known


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 20])
def test_given_up_after_so_many_steps(
    one: VllmEngine, shared: Store, asked: list[list[int]], steps: int
) -> None:
    """In the look-up, in the load, and while it decodes: some known, one new."""
    one.forget()
    ids = one.add([*asked, prompt(400, seed=61 + steps)], 30)
    if steps:
        one.step(steps, {})
    one.abort(ids)
    one.finish()
    goes_on(one, shared, asked)


def test_given_up_in_the_middle_of_a_load(one: VllmEngine, shared: Store, asked: list[list[int]]) -> None:
    one.forget()
    shared.arm(READ, "hold", after=2, times=1000)
    ids, answers = one.add(asked, 8), dict[str, Answer]()
    for _ in range(2000):
        assert one.step(4, answers)
        if shared.status()["met"].get(READ):
            break
    one.abort(ids)
    shared.disarm(READ)
    one.finish()
    goes_on(one, shared, asked)


def goes_on(one: VllmEngine, shared: Store, asked: list[list[int]]) -> None:
    """Nothing is held, and all that is known is still hit: with vLLM's blocks leaked it would run out."""
    one.idle_steps()
    shared.until_idle()
    one.until_nothing_is_held()
    one.forget()
    again = one.generate(asked)
    assert [answer.cached for answer in again] == [loadable(n, one.block_size) for n in LENGTHS]
    shared.until_idle()
    one.until_nothing_is_held()
