"""Several answers to one prompt (n > 1), as so many requests at once: its blocks are computed once, lie in
each pool once, and every answer is what it is alone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.monolithic import generate
from tests.role_parts import BLOCK_TOKENS, CACHING, ENGINE, check_pool, pair_over, prompt, request, shard

ANSWERS, LENGTH, OUTPUT = 4, 77, 10


@pytest.mark.parametrize("engine", [ENGINE, CACHING], ids=["plain", "caching"])
async def test_the_prompt_is_computed_once_and_lies_in_the_pool_once(
    folder: Path, engine: EngineConfig
) -> None:
    reference = Engine.load(folder, ENGINE)
    asked = [
        request(prompt(LENGTH), name=f"n{i}", temperature=0.9, seed=i, max_tokens=OUTPUT)
        for i in range(ANSWERS)
    ]
    async with pair_over(folder, [shard("s0"), shard("s1")], engine=engine) as pair:
        await asyncio.gather(*(pair.prefill.prefill(one) for one in asked))
        computed = (await pair.prefill.counters())["engine:tokens_computed"]
        assert computed == LENGTH + ANSWERS - 1, "of each other answer, the last token alone"
        full, held = LENGTH // BLOCK_TOKENS, 256 - pair.engines[0].free_blocks
        assert held <= full + ANSWERS
        handoffs = [await pair.prefill.handoff(one.request_id, 1) for one in asked]
        going_on = [handoff for handoff in handoffs if handoff is not None]
        assert [len(handoff.blocks) for handoff in going_on] == [full] * ANSWERS
        for handoff in going_on:
            await pair.decode.start(handoff)
        if engine is CACHING:
            loop, decoder = pair.workers[1].loop, pair.engines[1]
            async with asyncio.timeout(30):
                while loop.running < ANSWERS and pair.decode._events._end == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert 256 - decoder.free_blocks <= full + 2 * ANSWERS, "read once, or copied once"
        events = await pair.events_of([one.request_id for one in asked])
        for one, handoff in zip(asked, going_on, strict=True):
            said = tuple(event.token_id for event in events[one.request_id])
            assert (*handoff.request.output_ids, *said) == generate(reference, one)
        assert (await pair.decode.counters())["engine:tokens_computed"] == ANSWERS * (OUTPUT - 1)
        await pair.assert_nothing_held()
        for worker, loaded in zip(pair.workers, pair.engines, strict=True):
            check_pool(worker, loaded)
