"""However a request ends that was lent blocks of its worker's pool: no slot, lease or block is held."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.sampling.rows import NO_TOKEN, Drawn
from engine.sampling.sampler import Sampler
from engine.types import FinishReason, GenerationRequest
from kvstore.session import StoreSession
from tests.gates import GatedEngine, GatedShard
from tests.role_parts import CACHING, WAIT_S, Pair, pair_over, prompt, request, shard


def asked() -> GenerationRequest:
    """Of which the pools hold the beginning, once `warm` ran."""
    return request(prompt(20) + prompt(30, 1), max_tokens=12)


async def warm(pair: Pair) -> None:
    await pair.generate(request(prompt(20), name="before"))
    await pair.assert_nothing_held()


async def ended(pair: Pair) -> None:
    """What a router does at the end; then the pools still serve what they held."""
    for role in (pair.prefill, pair.decode):
        await role.abort("r", 1)
    await pair.assert_nothing_held()
    first = await pair.prefill.prefill(request(prompt(20), name="after", max_tokens=1))
    assert first.stats.cached_by_tier == {"device": 16}
    await pair.prefill.abort("after", 1)
    await pair.assert_nothing_held()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", GatedShard.POINTS)
async def test_giving_up_inside_any_call_of_the_store(folder: Path, call: str, when: str) -> None:
    driver = GatedShard()
    async with pair_over(folder, [driver], engine=CACHING) as pair:
        await warm(pair)
        driver.gate.at = f"{call} {when}"
        going = asyncio.create_task(pair.generate(asked()))
        await driver.gate.reached()
        await pair.prefill.abort("r", 1)
        await pair.decode.abort("r", 1)
        going.cancel()
        driver.gate.open()
        await asyncio.wait([going], timeout=WAIT_S)
        await ended(pair)


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("call", ["admit", "step", "take_tail"])
async def test_giving_up_inside_any_call_of_the_engine(folder: Path, call: str, worker: int) -> None:
    async with pair_over(folder, [shard()], engine=CACHING, engine_class=GatedEngine) as pair:
        await warm(pair)
        engine = pair.engines[worker]
        assert isinstance(engine, GatedEngine)
        engine.at = call
        going = asyncio.create_task(pair.generate(asked()))
        if (call, worker) != ("take_tail", 1):  # decode leaves no tail to anybody
            await engine.reached()
            await pair.prefill.abort("r", 1)
            await pair.decode.abort("r", 1)
            going.cancel()
        engine.opened.set()
        await asyncio.wait([going], timeout=WAIT_S)
        await ended(pair)


@pytest.mark.parametrize("turns", range(0, 60, 12))
async def test_giving_up_after_any_turn_of_the_event_loop(folder: Path, turns: int) -> None:
    async with pair_over(folder, [shard("s0"), shard("s1")], engine=CACHING) as pair:
        await warm(pair)
        going = asyncio.create_task(pair.generate(asked()))
        for _ in range(turns):
            await asyncio.sleep(0)
        going.cancel()
        await asyncio.wait([going], timeout=WAIT_S)
        await ended(pair)


async def test_a_failed_step_leaves_none_of_its_blocks_and_takes_none_of_others(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine=CACHING, engine_class=GatedEngine) as pair:
        await warm(pair)
        engine, edge = pair.engines[0], pair.workers[0].edge
        assert isinstance(engine, GatedEngine)
        assert edge is not None
        kept = len(edge.tier.kept_slots())
        engine.error = RuntimeError("the matrix is singular")
        with pytest.raises(RuntimeError, match="singular"):
            await pair.prefill.prefill(asked())
        await pair.assert_nothing_held()
        assert len(edge.tier.kept_slots()) == kept
        await ended(pair)


async def test_blocks_of_a_damaged_sequence_are_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends in an error for its numbers must not be there for the next one."""
    async with pair_over(folder, [shard()], engine=CACHING) as pair:
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "sample", staticmethod(lambda logits, *_: [Drawn(NO_TOKEN)] * len(logits)))
            first = await pair.prefill.prefill(request(prompt(40)))
            assert first.event.finish is FinishReason.ERROR
        edge = pair.workers[0].edge
        assert edge is not None
        assert edge.tier.kept_slots() == set()
        await pair.prefill.abort("r", 1)
        await pair.assert_nothing_held()


@pytest.mark.parametrize(("at", "published"), [(24, []), (32, [0, 1, 2])], ids=["prefill", "decode"])
async def test_blocks_of_a_damaged_sequence_are_not_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, published: list[int]
) -> None:
    """Not those of the step that showed it: `at` tokens make up full blocks."""
    offered: list[int] = []
    publish, sample = StoreSession.publish, Sampler.sample

    async def note(self: StoreSession, blocks: Any, **options: Any) -> Any:
        offered.extend(block.chain_index for block in blocks)
        return await publish(self, blocks, **options)

    def broken(logits: Any, rows: Any, *more: Any) -> list[Drawn]:
        damaged = any(len(row.tokens) == at for row in rows)
        return [Drawn(NO_TOKEN)] * len(rows) if damaged else sample(logits, rows, *more)

    monkeypatch.setattr(StoreSession, "publish", note)
    monkeypatch.setattr(Sampler, "sample", staticmethod(broken))
    async with pair_over(folder, [shard()]) as pair:
        first = await pair.prefill.prefill(request(prompt(24)))
        handoff = await pair.prefill.handoff("r", 1)
        assert (handoff is None) == (first.event.finish is FinishReason.ERROR) == (at == 24)
        if handoff is not None:
            await pair.decode.start(handoff)
            (events,) = (await pair.events_of(["r"])).values()
            assert events[-1].finish is FinishReason.ERROR
        await pair.assert_nothing_held()
    assert offered == published


async def test_a_parked_prompt_that_nobody_fetches_leaves_its_blocks_idle(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine=CACHING, parked_s=0.001) as pair:
        await pair.prefill.prefill(request(prompt(40)))
        edge = pair.workers[0].edge
        assert edge is not None
        assert edge.driver.core.index.rooms.idle_versions == 0
        async with asyncio.timeout(WAIT_S):
            while not pair.prefill.sweep():  # noqa: ASYNC110 - time itself is what is waited for
                await asyncio.sleep(0)
        await pair.assert_nothing_held()
        assert edge.driver.core.index.rooms.idle_versions == 5
