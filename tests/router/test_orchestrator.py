"""Promise 5: an answer is the same whichever workers make it, and whichever of them die on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.types import FinishReason, SamplingParams, TokenEvent
from kvstore.clock import ManualClock
from kvstore.nouns import Epoch, WeightsDigest
from router.attempts import AttemptLimits, Job
from router.errors import GenerationFailed, NotReady, Overloaded
from router.fleet import Member
from router.orchestrator import Piece
from tests.router.fakes import FakeDecode, FakeService, facts, fake_service

TEXT = "The tide comes in."


def job(**sampling: object) -> Job:
    params = {"max_tokens": 64, "temperature": 0.0} | sampling
    return Job("r-1", (5, 6, 7), SamplingParams(**params))  # type: ignore[arg-type]


async def answer(service: FakeService, asked: Job) -> tuple[str, list[Piece]]:
    async with asyncio.timeout(10):
        pieces = [piece async for piece in service.backend.orchestrator.generate(asked)]
    return "".join(piece.text for piece in pieces), pieces


async def test_prefill_hands_off_to_decode_and_the_text_is_whole(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    text, pieces = await answer(service, job())
    assert text == TEXT
    assert [piece.finish is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert service.decode[0].started[0].request.output_ids == (pieces[0].token_id,)
    assert pieces[0].stats is not None


async def test_a_decode_worker_that_dies_loses_and_doubles_nothing(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, decode=2)
    service.decode[0].dies_after = 3
    service.decode[1].dies_after = 3
    reserve = FakeDecode(service.decode[0].script)
    service.backend.orchestrator.add_decode(Member(facts("decode-9"), reserve))
    text, _ = await answer(service, job())
    assert text == TEXT
    resumed = service.prefill[0].requests[-1]
    assert len(service.prefill[0].requests) == resumed.attempt
    assert len(resumed.output_ids) in (0, 4, 8)


async def test_a_dead_prefill_worker_is_gone_around(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, prefill=2)
    service.prefill[0].dead = True
    for _ in range(8):
        assert (await answer(service, job()))[0] == TEXT


async def test_a_silent_worker_is_given_up_within_the_bound(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, limits=AttemptLimits(stall_s=0.05))
    service.decode[0].silent_after = 2
    other = FakeDecode(service.decode[0].script)
    loaded = Member(facts("decode-9"), other, load=1_000)
    service.backend.orchestrator.add_decode(loaded)
    assert (await answer(service, job()))[0] == TEXT
    assert ("r-1", 1) in service.decode[0].aborted


async def test_doubled_and_stale_events_change_nothing(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    service.decode[0].mangle = lambda events: [e for e in events for _ in range(3)]
    assert (await answer(service, job()))[0] == TEXT
    assert service.backend.metrics.dropped_events["seen"] > 0


async def test_a_sequence_nobody_waits_for_is_aborted_once(tmp_path: Path) -> None:
    """As one whose abort overtook its start: it would run to its last token."""
    service = fake_service(tmp_path, TEXT)
    stray = [TokenEvent("r-stray", attempt, index, 5) for index in range(9) for attempt in (1, 2)]
    old = [TokenEvent("r-1", 0, 0, 5)]
    over = [TokenEvent("r-over", 1, 9, 5, FinishReason.LENGTH)]
    service.decode[0].mangle = lambda events: [*stray, *old, *over, *events]
    assert (await answer(service, job()))[0] == TEXT
    for _ in range(5):
        await asyncio.sleep(0)
    assert service.decode[0].aborted == [("r-stray", 1), ("r-stray", 2), ("r-1", 0)]
    assert service.backend.metrics.dropped_events["unknown_request"] == len(stray) + len(over)


async def test_attempts_are_bounded_and_the_last_reason_is_told(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, prefill=3)
    for worker in service.prefill:
        worker.dead = True
    with pytest.raises(GenerationFailed, match=r"3 attempts failed.*the prefill worker died"):
        await answer(service, job())


async def test_an_answer_never_goes_on_under_other_weights(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, limits=AttemptLimits(recovery_s=0.05))
    orchestrator = service.backend.orchestrator
    service.decode[0].dies_after = 2
    newer = Epoch(2, WeightsDigest(b"n" * 16))
    pieces = orchestrator.generate(job())
    got = [await anext(pieces)]
    orchestrator.add_decode(Member(facts("decode-n", newer), FakeDecode(service.decode[0].script)))
    orchestrator.fleet.prefill.clear()
    orchestrator.add_prefill(Member(facts("prefill-n", newer), service.prefill[0]))
    got += [await anext(pieces), await anext(pieces)]
    with pytest.raises(GenerationFailed) as caught:
        await anext(pieces)
    assert caught.value.code == "epoch_gone"
    assert "".join(piece.text for piece in got) == TEXT[:3]


async def test_without_workers_of_one_epoch_a_request_is_not_ready(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, limits=AttemptLimits(recovery_s=0.05))
    await service.backend.orchestrator.remove("decode-0", "test")
    with pytest.raises(NotReady):
        await answer(service, job())


async def test_a_resumed_request_waits_for_a_worker_to_come_back(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    service.decode[0].dies_after = 2
    pieces = service.backend.orchestrator.generate(job())
    got = [await anext(pieces) for _ in range(3)]
    waiting = asyncio.ensure_future(anext(pieces))
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    back = FakeDecode(service.decode[0].script)
    service.backend.orchestrator.add_decode(Member(facts("decode-1"), back))
    got.append(await asyncio.wait_for(waiting, 5))
    got += [piece async for piece in pieces]
    assert "".join(piece.text for piece in got) == TEXT


async def test_leaving_early_frees_the_workers(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    service.decode[0].silent_after = 1
    pieces = service.backend.orchestrator.generate(job())
    await anext(pieces)
    await pieces.aclose()
    await service.backend.orchestrator.close()
    assert ("r-1", 1) in service.prefill[0].aborted


async def test_a_stop_string_ends_the_answer_and_frees_the_workers(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    text, pieces = await answer(service, job(stop=("comes",)))
    assert text == "The tide "
    assert pieces[-1].finish is not None
    assert pieces[-1].finish.value == "stop"


async def test_a_stop_token_does_not_show(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    dot = service.backend.tokenizer.encode(".")[0]
    assert (await answer(service, job(stop_token_ids=(dot,))))[0] == TEXT[:-1]


async def test_a_preempted_sequence_is_no_fault_of_its_worker(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, limits=AttemptLimits(stall_s=0.02, prefill_s=5.0, attempts_max=1))
    decode = service.decode[0]
    decode.silent_after, decode.preempted = 2, [("r-1", 1)]
    pieces = service.backend.orchestrator.generate(job())
    await anext(pieces)
    waiting = asyncio.ensure_future(_rest(pieces))
    await asyncio.wait([waiting], timeout=0.2)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])


async def _rest(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def test_only_workers_can_stall_not_readers(tmp_path: Path) -> None:
    clock = ManualClock()
    service = fake_service(tmp_path, TEXT, clock=clock)
    orchestrator, decode = service.backend.orchestrator, service.decode[0]
    slow = orchestrator.generate(job())
    await anext(slow)
    for _ in range(20):
        await asyncio.sleep(0)  # decode says all it has
    clock.advance(1000)
    assert orchestrator.stalled_s() == 0.0  # its reader takes its time; no worker is to blame
    decode.silent_after = 2
    hung = orchestrator.generate(replace(job(), request_id="r-2"))
    await anext(hung)
    assert orchestrator.stalled_s() == 0.0
    for _ in range(20):
        await asyncio.sleep(0)
    clock.advance(5)
    await anext(hung)
    assert orchestrator.stalled_s() == 5.0  # reading what is there is no progress
    await slow.aclose()
    await hung.aclose()
    assert orchestrator.stalled_s() == 0.0


async def test_admission_is_bounded(tmp_path: Path) -> None:
    orchestrator = fake_service(tmp_path, running_max=2).backend.orchestrator
    with orchestrator.admit(2), pytest.raises(Overloaded), orchestrator.admit():
        pass
    with orchestrator.admit(2):
        assert orchestrator.running == 2


async def test_the_least_loaded_worker_of_the_newest_epoch_is_chosen(tmp_path: Path) -> None:
    fleet = fake_service(tmp_path, prefill=3).backend.orchestrator.fleet
    fleet.prefill["prefill-0"].load = 10
    fleet.prefill["prefill-2"].load = 10
    for _ in range(8):
        pair = fleet.choose()
        assert pair is not None
        assert pair.prefill.facts.worker_id == "prefill-1"
    chosen = fleet.choose(avoid={"prefill-1"})
    assert chosen is not None
    assert chosen.prefill.facts.worker_id != "prefill-1"
