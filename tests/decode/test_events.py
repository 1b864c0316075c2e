"""The event log's promises: nothing twice, nothing lost within its bound, one answer for a step's tokens."""

from __future__ import annotations

import asyncio

from decode.events import EventLog
from engine.types import TokenEvent
from tests.role_parts import WAIT_S


def event(name: str, index: int, attempt: int = 1) -> TokenEvent:
    return TokenEvent(name, attempt, index, 7)


async def test_a_poll_is_answered_with_what_came_since_its_cursor_and_may_be_repeated() -> None:
    log = EventLog(100)
    said = [event("a", 0), event("b", 0), event("a", 1)]
    for one in said:
        log.append(one)
    first = await log.wait(0, WAIT_S)
    assert (first.cursor, list(first.events)) == (3, said)
    assert await log.wait(0, WAIT_S) == first
    log.append(event("b", 1))
    assert list((await log.wait(first.cursor, WAIT_S)).events) == [event("b", 1)]


async def test_a_poll_waits_for_the_first_event_and_takes_the_whole_step_along() -> None:
    log = EventLog(100)
    waiting = asyncio.create_task(log.wait(0, WAIT_S))
    await asyncio.sleep(0)
    for name in ("a", "b", "c"):  # one dispatch of one step: no turn of the event loop in between
        log.append(event(name, 0))
    assert [one.request_id for one in (await waiting).events] == ["a", "b", "c"]


async def test_a_poll_that_waited_in_vain_keeps_its_cursor() -> None:
    log = EventLog(100)
    log.append(event("a", 0))
    polled = await log.wait(1, 0.001)
    assert (polled.cursor, polled.events) == (1, ())


async def test_the_oldest_are_let_go_and_counted() -> None:
    log = EventLog(3)
    for index in range(5):
        log.append(event("a", index))
    polled = await log.wait(1, WAIT_S)
    assert [one.index for one in polled.events] == [2, 3, 4], "the gap shows in the index"
    assert polled.cursor == 5
    assert log.dropped == 2


async def test_a_cursor_of_another_life_is_answered_from_the_oldest_event() -> None:
    log = EventLog(100)
    log.append(event("a", 0))
    assert list((await log.wait(900, WAIT_S)).events) == [event("a", 0)]


async def test_what_a_superseded_attempt_said_is_not_told_any_more() -> None:
    log = EventLog(100)
    for attempt in (1, 2):
        log.append(event("a", 0, attempt))
        log.append(event("b", 0, attempt))
    log.forget("a", 2)
    polled = await log.wait(0, WAIT_S)
    assert [(one.request_id, one.attempt) for one in polled.events] == [("b", 1), ("a", 2), ("b", 2)]
    assert polled.cursor == 4
