"""Promise 5: no token is lost or doubled, whichever worker sends it and however often."""

from __future__ import annotations

import asyncio

import pytest

from engine.types import FinishReason, TokenEvent
from kvstore.clock import ManualClock
from router.errors import GenerationFailed, WorkerFailed, WorkerGone, WorkerSlow
from router.streams import TokenStream


def event(attempt: int, index: int, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent("r", attempt, index, 100 + index, finish)


async def read_all(stream: TokenStream) -> list[int]:
    tokens = []
    while (told := await asyncio.wait_for(stream.next(), 1)) is not None:
        tokens.append(told.token_id)
    return tokens


async def test_the_worked_example_of_the_module() -> None:
    stream = TokenStream("r", ManualClock())
    stream.begin_attempt()
    for index in range(5):
        assert stream.offer(event(1, index)) is None
    stream.begin_attempt()
    assert stream.offer(event(1, 5)) == "old_attempt"
    assert stream.offer(event(2, 4)) == "seen"
    assert stream.offer(event(2, 5)) is None
    assert stream.offer(event(2, 7)) == "gap"
    with pytest.raises(WorkerFailed, match="token 6 was lost"):
        await stream.attempt_over(1, 1)
    assert stream.accepted == [100, 101, 102, 103, 104, 105]


async def test_what_was_accepted_before_a_failure_reaches_the_reader() -> None:
    stream = TokenStream("r", ManualClock())
    stream.begin_attempt()
    stream.offer(event(1, 0))
    stream.fail(WorkerGone("gone"))
    with pytest.raises(WorkerGone):
        await stream.attempt_over(1, 1)
    stream.begin_attempt()
    stream.offer(event(2, 1, FinishReason.LENGTH))
    await stream.attempt_over(1, 1)
    assert await read_all(stream) == [100, 101]


async def test_nothing_is_taken_after_the_last_token() -> None:
    stream = TokenStream("r", ManualClock())
    stream.begin_attempt()
    stream.offer(event(1, 0, FinishReason.STOP))
    assert stream.offer(event(1, 1)) == "old_attempt"
    assert await read_all(stream) == [100]


async def test_a_worker_that_ends_with_an_error_ends_the_attempt_in_its_words() -> None:
    stream = TokenStream("r", ManualClock())
    stream.begin_attempt()
    stream.offer(TokenEvent("r", 1, 0, -1, FinishReason.ERROR, "the pool is gone"))
    with pytest.raises(WorkerFailed, match="the pool is gone"):
        await stream.attempt_over(1, 1)
    assert stream.accepted == []


async def test_silence_is_bounded_by_the_clock() -> None:
    clock = ManualClock()
    stream = TokenStream("r", clock)
    stream.begin_attempt()
    clock.advance(5)
    stream.offer(event(1, 0))
    clock.advance(5)
    stream.offer(event(1, 1))
    clock.advance(5)
    with pytest.raises(WorkerSlow, match="no token came for 5 s"):
        await stream.attempt_over(60, 5)


async def test_the_wait_for_decode_to_begin_is_no_stall() -> None:
    clock = ManualClock()
    stream = TokenStream("r", clock)
    for attempt in (1, 2):
        stream.begin_attempt()
        stream.offer(event(attempt, attempt - 1))  # prefill's
        clock.advance(59)
        over = asyncio.create_task(stream.attempt_over(60, 5))
        await asyncio.wait([over], timeout=0.01)
        assert not over.done()
        over.cancel()
    clock.advance(1)
    with pytest.raises(WorkerSlow, match="no token came for 60 s"):
        await stream.attempt_over(60, 5)


async def test_the_wait_of_a_preempted_sequence_is_no_stall_until_its_next_token() -> None:
    clock = ManualClock()
    stream = TokenStream("r", clock)
    stream.begin_attempt()
    for index in range(2):
        stream.offer(event(1, index))
    stream.preempted(1)
    clock.advance(59)
    over = asyncio.create_task(stream.attempt_over(60, 5))
    await asyncio.wait([over], timeout=0.01)
    assert not over.done()
    over.cancel()
    stream.offer(event(1, 2))
    stream.preempted(0)  # an attempt that was given up
    clock.advance(5)
    with pytest.raises(WorkerSlow, match="no token came for 5 s"):
        await stream.attempt_over(60, 5)
    stream.preempted(1)
    clock.advance(55)
    with pytest.raises(WorkerSlow, match="no token came for 60 s"):
        await stream.attempt_over(60, 5)


async def test_a_closed_stream_gives_what_it_has_and_then_the_error() -> None:
    stream = TokenStream("r", ManualClock())
    stream.begin_attempt()
    stream.offer(event(1, 0))
    stream.close(GenerationFailed("no more"))
    first = await stream.next()
    assert first is not None
    assert first.token_id == 100
    with pytest.raises(GenerationFailed):
        await stream.next()
