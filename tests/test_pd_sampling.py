"""Promise 5 for requests that shape their draws: a pair says what one process says, logprobs included."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from engine.engine import Engine
from engine.types import GenerationRequest, TokenEvent
from tests.role_parts import ENGINE, pair_over, prompt, request, shard


def shaped(number: int) -> GenerationRequest:
    asked = request(prompt(20 + 9 * number, number), name=f"r{number}", max_tokens=14, seed=number)
    sampling = replace(
        asked.sampling,
        temperature=0.0 if number == 0 else 0.8,
        repetition_penalty=1.2,
        presence_penalty=0.3 * number,
        frequency_penalty=0.5,
        logit_bias=((30 + number, 4.0),),
        min_p=0.02,
        logprobs=number,
    )
    return replace(asked, sampling=sampling)


def alone(folder: Path, asked: GenerationRequest) -> list[TokenEvent]:
    engine = Engine.load(folder, ENGINE)
    events: list[TokenEvent] = []
    engine.admit(asked)
    while engine.has_work():
        events.extend(engine.step().events)
    return events


async def test_a_pair_says_what_one_process_says_from_any_token_on(folder: Path) -> None:
    asked = [shaped(number) for number in range(4)]
    expected = {one.request_id: alone(folder, one) for one in asked}
    async with pair_over(folder, [shard()]) as pair:
        for said in (0, 5):
            again = [
                replace(
                    one,
                    attempt=said + 1,
                    output_ids=tuple(event.token_id for event in expected[one.request_id][:said]),
                )
                for one in asked
            ]
            firsts = await asyncio.gather(*(pair.prefill.prefill(one) for one in again))
            for one in again:
                handoff = await pair.prefill.handoff(one.request_id, one.attempt)
                assert handoff is not None
                await pair.decode.start(handoff)
            rest = await pair.events_of([one.request_id for one in again])
            for one, first in zip(again, firsts, strict=True):
                events = [first.event, *(e for e in rest[one.request_id] if e.attempt == one.attempt)]
                assert {event.epochs for event in events} == {(1,)}
                told = [replace(event, attempt=1, epochs=()) for event in events]
                assert told == expected[one.request_id][said:]
        await pair.assert_nothing_held()
