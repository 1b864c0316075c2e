"""Seeded histories of vLLM in miniature: requests arrive, are looked up, loaded, preempted, aborted, finish.

Whatever happens, every token attended to and every block saved is right (engine.py, workers.py), and at the
end no lease, chain, block or task is left (store.py).
"""

from __future__ import annotations

import random

import pytest

from tests.kvstore.integrations.vllm.engine import FakeEngine
from tests.kvstore.integrations.vllm.parts import W1, counted, engine_of, setup_of
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore

STEPS = 60


def act(engine: FakeEngine, dice: random.Random, number: int, stems: list[list[int]]) -> None:
    deed = dice.random()
    live = [request for request in engine.requests.values() if request.state != "over"]
    if deed < 0.35 and len(live) < 8:
        stem = dice.choice(stems)
        tokens = [*stem[: dice.randint(1, len(stem))], number]
        salt = dice.choice([None, None, "salted"])
        engine.add(FakeRequest(f"r{number}", tokens, dice.randint(1, 12), cache_salt=salt))
    elif deed < 0.45 and live:
        engine.abort(dice.choice(live))
    elif deed < 0.55 and engine.running:
        engine.preempt(dice.choice(engine.running))
    elif deed < 0.6:
        engine.workers.broken = {dice.randrange(0, 40, 4)} if dice.random() < 0.5 else set()
    if dice.random() < 0.7:
        assert engine.side.settle()
    engine.step()


@pytest.mark.parametrize("seed", range(24))
def test_nothing_is_wrong_and_nothing_is_left(store: LocalStore, seed: int) -> None:
    dice = random.Random(seed)
    setup = setup_of(
        ranks=dice.choice([1, 1, 2]),
        vllm_block=dice.choice([2, 4, 8]),
        save=dice.choice(["all", "prompt"]),
        min_load_tokens=dice.choice([1, 8]),
    )
    stems = [[100 * stem + position for position in range(48)] for stem in (1, 2)]
    loaded = 0
    for turn in range(2):  # the second engine meets what the first has saved
        engine = engine_of(
            store,
            W1,
            setup=setup,
            pool_blocks=dice.choice([36, 60]),
            ahead=dice.random() < 0.5,
            drafts=dice.choice([0, 0, 3]),
            seed=seed,
        )
        seen: list[FakeRequest] = []
        for number in range(STEPS):
            act(engine, dice, 1000 * turn + number, stems)
            seen += [request for request in engine.requests.values() if request not in seen]
        engine.run()
        loaded += sum(request.loaded for request in seen)
        assert engine.side.settle()
        assert (store.leases(), engine.scheduling.lookups.held) == (0, 0)
        assert (engine.scheduling._requests, engine.scheduling._gone_loading) == ({}, {})
        assert (engine.scheduling._asked, engine.scheduling._waiting) == (0, set())
        assert engine.scheduling._siblings._accounted == {}
        assert counted(engine).get("other_connector_loads", 0) == 0, "nobody else loads here"
        engine.step()
        assert engine.workers.chains == {}
        assert not any(engine.users)
        engine.close()
    assert loaded > 0
