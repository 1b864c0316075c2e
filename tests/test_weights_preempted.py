"""Weights that change under sequences some of which were preempted: promise 3 in a pool too small for all."""

from __future__ import annotations

import asyncio
from itertools import groupby

import pytest

from engine.prediction import OutputPrediction
from engine.types import UpdateMode
from tests.role_parts import CACHING, ENGINE, WAIT_S, prompt, request
from tests.tiny_model import make_tiny_model
from tests.weights_parts import (
    Oracle,
    assert_drawn_by_fresh_engines,
    assert_whole,
    inspect,
    settled,
    stores_of,
    under_load,
    update_both,
)

POOL = {"pool_blocks": 22, "max_model_len": 160}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    root = tmp_path_factory.mktemp("epochs")
    return Oracle([make_tiny_model(root / str(seed), seed) for seed in range(3)])


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
@pytest.mark.parametrize("mode", [UpdateMode.KEEP, UpdateMode.RECOMPUTE])
async def test_who_waits_to_come_back_begins_again_under_the_new_weights(
    oracle: Oracle, mode: UpdateMode, caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputPrediction, "tokens", lambda _, known, longest: min(known + 1, longest))
    engine = (CACHING if caching else ENGINE).model_copy(update=POOL)
    async with under_load(oracle, engine) as load:
        loop = load.pair.workers[1].loop
        load.begin(*(request(prompt(20, i), name=f"a{i}", max_tokens=60) for i in range(5)))
        async with asyncio.timeout(WAIT_S):
            while not any(one.again and not one.running for one in loop._admitted.values()):  # noqa: ASYNC110
                await asyncio.sleep(0)
        await update_both(load, oracle, 2, mode, prefill_first=False)
        load.begin(*(request(prompt(20, i), name=f"b{i}", max_tokens=30) for i in range(3)))
        await load.over()
        assert_whole(load)
        both = 0
        for name, said in load.said.items():
            epochs = [key for key, _ in groupby(said, key=lambda event: event.epochs)]
            if (1, 2) in epochs:
                both += 1
                assert epochs[-1] == (1, 2)
            else:
                assert epochs in ([(1,)], [(2,)], [(1,), (2,)])
                assert_drawn_by_fresh_engines(oracle, load.asked[name], said)
        assert bool(both) == (mode is UpdateMode.KEEP)
        await settled(load.pair)
        seen = await inspect(oracle, stores_of(load.pair), load.texts)
        assert set(seen) == {1, 2}
        await load.pair.assert_nothing_held()
