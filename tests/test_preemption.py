"""Preemption through the service: a pool too small for all, and every token as if it were not.

Promise 5 under pressure, and conservation: who leaves and comes back is told nothing twice, leaves no slot or
lease behind, and publishes each block once.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.monolithic import generate
from engine.prediction import OutputPrediction
from engine.types import GenerationRequest, TokenEvent
from engine.worker import WorkerLoop
from kvstore.session import StoreSession
from tests.role_parts import CACHING, ENGINE, WAIT_S, Pair, check_pool, pair_over, prompt, request, shard

Alone = Callable[[GenerationRequest], tuple[int, ...]]
POOL = {"pool_blocks": 22, "max_model_len": 160}
SMALL, SMALL_CACHING = ENGINE.model_copy(update=POOL), CACHING.model_copy(update=POOL)
MODES = pytest.mark.parametrize("engine", [SMALL, SMALL_CACHING], ids=["plain", "caching"])


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    engine = Engine.load(folder, ENGINE)
    return lambda asked: generate(engine, asked)


@pytest.fixture(autouse=True)
def optimism(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission expects no more output, so that too many run."""
    monkeypatch.setattr(OutputPrediction, "tokens", lambda _, known, longest: min(known + 1, longest))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, bytes]]:
    """How often each owner has offered each block to the store."""
    seen: Counter[tuple[str, bytes]] = Counter()
    publish = StoreSession.publish

    async def count(self: StoreSession, blocks: Any, *, owner: str, **options: Any) -> Any:
        seen.update((owner, bytes(block.key)) for block in blocks)
        return await publish(self, blocks, owner=owner, **options)

    monkeypatch.setattr(StoreSession, "publish", count)
    return seen


async def prefilled(pair: Pair, asked: list[GenerationRequest]) -> list[Any]:
    handoffs = []
    for one in asked:
        await pair.prefill.prefill(one)
        handoffs.append(await pair.prefill.handoff(one.request_id, one.attempt))
    return handoffs


@MODES
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
async def test_decode_preempts_and_every_sequence_says_what_it_says_alone(
    folder: Path, alone: Alone, engine: EngineConfig, temperature: float, published: Counter[Any]
) -> None:
    asked = [
        request(prompt(17 + 5 * i, i), name=f"r{i}", max_tokens=70, temperature=temperature, seed=i)
        for i in range(6)
    ]
    async with pair_over(folder, [shard()], engine=engine) as pair:
        outputs = await pair.decode_each(await prefilled(pair, asked))
        for one, output in zip(asked, outputs, strict=True):
            assert output == alone(one)
        counters = await pair.decode.counters()
        assert counters["engine:preempted"] > 0
        assert not counters.get("engine:failed_sinks")
        assert not counters.get("engine:failed_steps")
        await pair.assert_nothing_held()
        assert max(published.values()) == 1, "a block was published twice"
        if engine is SMALL_CACHING:
            full = sum((len(one.prompt_ids) + 69) // 8 * 8 for one in asked)
            assert counters["engine:tokens_computed"] < 2 * full, "what lay in the pool was computed again"


async def said_by(
    pair: Pair, names: list[str], preempted: set[tuple[str, int]] | None = None
) -> dict[str, list[TokenEvent]]:
    """What each of them said, whatever others do; in the order in which they ended. `preempted` takes those
    that a poll named."""
    said: dict[str, list[TokenEvent]] = {}
    ended: dict[str, list[TokenEvent]] = {}
    async with asyncio.timeout(WAIT_S):
        while not ended.keys() >= set(names):
            polled = await pair.decode.poll(pair.cursor, 5.0)
            pair.cursor = polled.cursor
            if preempted is not None:
                preempted.update(polled.preempted)
            for event in polled.events:
                said.setdefault(event.request_id, []).append(event)
                if event.finish is not None:
                    ended[event.request_id] = said[event.request_id]
    return ended


@MODES
async def test_prefill_preempts_who_came_last(
    folder: Path, alone: Alone, engine: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked prompts that were all let in, as if their first chunk were all they need."""
    asked = [request(prompt(150, i), name=f"r{i}", max_tokens=4) for i in range(3)]
    async with pair_over(folder, [shard()], engine=engine, parked_s=600.0) as pair:
        prefiller = pair.engines[0]
        monkeypatch.setattr(prefiller._demand, "of", lambda *_: 1)
        monkeypatch.setattr(prefiller._demand, "promised", lambda _: 0)

        async def one(wanted: GenerationRequest) -> tuple[int, ...]:
            await pair.prefill.prefill(wanted)
            async with asyncio.timeout(WAIT_S):
                while not pair.workers[0].loop.counters["engine:preempted"]:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            handoff = await pair.prefill.handoff(wanted.request_id, 1)
            assert handoff is not None
            assert len(handoff.blocks) == 18
            return await pair.decode_all(handoff)

        outputs = await asyncio.gather(*(one(wanted) for wanted in asked))
        assert list(outputs) == [alone(wanted) for wanted in asked]
        assert (await pair.prefill.counters())["engine:preempted"] > 0
        await pair.assert_nothing_held()


@MODES
@pytest.mark.parametrize("seed", range(2))
async def test_aborts_in_every_phase_leave_nothing(
    folder: Path, alone: Alone, engine: EngineConfig, seed: int
) -> None:
    """Running, preempted, waiting again, in the middle of an admission."""
    draw = random.Random(seed)
    asked = [request(prompt(20 + i, i), name=f"r{i}", max_tokens=60) for i in range(7)]
    async with pair_over(folder, [shard()], engine=engine) as pair:
        handoffs = await prefilled(pair, asked)
        for handoff in handoffs:
            await pair.decode.start(handoff)
        given_up = draw.sample(asked, 3)
        for one in given_up:
            for _ in range(draw.randrange(200)):
                await asyncio.sleep(0)
            await pair.decode.abort(one.request_id, 1)
        lasting = [one for one in asked if one not in given_up]
        said = await said_by(pair, [one.request_id for one in lasting])
        for one in lasting:
            assert tuple(event.token_id for event in said[one.request_id]) == alone(one)[1:]
        await pair.assert_nothing_held()
        for worker, loaded in zip(pair.workers, pair.engines, strict=True):
            check_pool(worker, loaded)


async def test_the_most_urgent_is_never_preempted(folder: Path, alone: Alone) -> None:
    asked = [request(prompt(30, i), name=f"r{i}", max_tokens=80) for i in range(4)]
    async with pair_over(folder, [shard()], engine=SMALL) as pair:
        handoffs = await prefilled(pair, asked)
        urgent = handoffs[-1]
        object.__setattr__(urgent.request, "priority", -1)
        for handoff in handoffs:
            await pair.decode.start(handoff)
        preempted: set[tuple[str, int]] = set()
        said = await said_by(pair, [one.request_id for one in asked], preempted)
        assert next(iter(said)) == "r3", "who came last but is most urgent ended first"
        assert preempted, "a router must hear of it, or takes the worker for slow"
        assert ("r3", 1) not in preempted
        await pair.assert_nothing_held()


@MODES
async def test_the_first_in_order_never_leaves_for_one_behind_it(
    folder: Path, alone: Alone, engine: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while one that was preempted stands at the entrance and is lent what it left there."""
    left: list[tuple[str, str]] = []
    wait_again = WorkerLoop._wait_again

    def note(self: WorkerLoop, request: GenerationRequest, admitted: Any) -> None:
        first = min(self._admitted, key=lambda name: self._admitted[name].order)
        left.append((request.request_id, first))
        wait_again(self, request, admitted)

    monkeypatch.setattr(WorkerLoop, "_wait_again", note)
    asked = [request(prompt(17 + 5 * i, i), name=f"r{i}", max_tokens=110) for i in range(4)]
    async with pair_over(folder, [shard()], engine=engine) as pair:
        outputs = await pair.decode_each(await prefilled(pair, asked))
        assert outputs == [alone(one) for one in asked]
        await pair.assert_nothing_held()
    assert left
    assert not [name for name, first in left if name == first]


async def test_an_urgent_prompt_that_fits_waits_for_none_that_do_not(folder: Path) -> None:
    """As many of those as may load at one time, and one more."""
    async with pair_over(folder, [shard()], engine=SMALL_CACHING, parked_s=600.0) as pair:
        await pair.prefill.prefill(request(prompt(120), name="parked", max_tokens=2))
        loop, limits = pair.workers[0].loop, pair.workers[0].limits
        lesser = [
            replace(request(prompt(90, i), name=f"lesser {i}", max_tokens=2), priority=5)
            for i in range(1, limits.loading_max + 2)
        ]
        waiting = [asyncio.create_task(pair.prefill.prefill(one)) for one in lesser]
        async with asyncio.timeout(WAIT_S):
            while loop.waiting < limits.loading_max:  # noqa: ASYNC110
                await asyncio.sleep(0)
            urgent = replace(request(prompt(9), name="urgent", max_tokens=2), priority=-5)
            await pair.prefill.prefill(urgent)
        assert loop.waiting == limits.loading_max
        for one in lesser:
            await pair.prefill.abort(one.request_id, 1)
        await asyncio.gather(*waiting, return_exceptions=True)
        for name in ("urgent", "parked"):
            await pair.prefill.abort(name, 1)
        await pair.assert_nothing_held()
