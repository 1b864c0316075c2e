"""What costs a request an attempt and what only a wait: the dead, the full, the wrong answer, the hung."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engine.types import FinishReason, FirstToken, GenerationRequest, Handoff, PrefillStats, TokenEvent
from kvstore.errors import DeadlineExceeded, OverLimit, Unavailable
from router.attempts import AttemptLimits
from router.errors import DeadlinePassed, GenerationFailed, NotReady, Overloaded
from router.fleet import Member
from tests.router.fakes import FakeDecode, FakePrefill, FakeService, Script, facts, fake_service
from tests.router.test_orchestrator import TEXT, answer, job

HASTY = AttemptLimits(retry_s=0.001, retry_s_max=0.002)


class SometimesFull(FakeDecode):
    """Has no room for its first `full` handoffs; says so by event, as a decode worker does, or at once."""

    full = 5
    at_once = False

    async def start(self, handoff: Handoff) -> None:
        if len(self.started) >= self.full:
            await super().start(handoff)
            return
        self.started.append(handoff)
        if self.at_once:
            raise OverLimit("this worker holds 256 sequences already")
        request = handoff.request
        message = "OverLimit: no room in this engine within 30.0 s"
        index = len(request.output_ids)
        self._log.append(
            TokenEvent(request.request_id, request.attempt, index, -1, FinishReason.ERROR, message)
        )
        self._news.set()


async def with_decode(service: FakeService, worker: FakeDecode) -> None:
    await service.backend.orchestrator.remove("decode-0", "another takes its place")
    service.backend.orchestrator.add_decode(Member(facts("decode-1"), worker))


async def test_a_prefill_worker_that_dies_is_reported_and_its_successor_waited_for(tmp_path: Path) -> None:
    lost: list[str] = []

    def replace_it(worker_id: str) -> None:
        lost.append(worker_id)
        successor = Member(facts("prefill-0.2"), FakePrefill(service.prefill[0].script))
        asyncio.get_running_loop().call_later(0.02, service.backend.orchestrator.add_prefill, successor)

    service = fake_service(tmp_path, TEXT, gone=replace_it)
    service.prefill[0].dead = True
    texts = await asyncio.gather(*(answer(service, replace(job(), request_id=f"r-{i}")) for i in range(3)))
    assert [text for text, _ in texts] == [TEXT] * 3
    assert lost == ["prefill-0"]
    assert len(service.prefill[0].requests) <= 3  # nobody asks the dead twice


async def test_a_request_that_comes_while_the_only_worker_is_away_waits_for_it(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    orchestrator = service.backend.orchestrator
    await orchestrator.remove("prefill-0", "it died")
    waiting = asyncio.create_task(answer(service, job()))
    await asyncio.wait([waiting], timeout=0.02)
    assert not waiting.done()
    orchestrator.add_prefill(Member(facts("prefill-0.2"), service.prefill[0]))
    assert (await waiting)[0] == TEXT


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_full_decode_worker_costs_waits_and_no_attempts(tmp_path: Path, at_once: bool) -> None:
    service = fake_service(tmp_path, TEXT, limits=HASTY)
    worker = SometimesFull(service.decode[0].script)
    worker.at_once = at_once
    await with_decode(service, worker)
    assert (await answer(service, job()))[0] == TEXT
    assert len(worker.started) == 6  # more than attempts_max


@pytest.mark.parametrize(
    ("refusal", "told"), [(OverLimit("full"), Overloaded), (Unavailable("draining"), NotReady)]
)
async def test_patience_with_busy_workers_ends_within_the_bound(
    tmp_path: Path, refusal: Exception, told: type[Exception]
) -> None:
    limits = AttemptLimits(recovery_s=0.05, retry_s=0.001, retry_s_max=0.002)
    service = fake_service(tmp_path, TEXT, limits=limits)
    service.prefill[0].refuse = refusal
    with pytest.raises(told, match=str(refusal)):
        await answer(service, job())
    assert len(service.prefill[0].requests) > limits.attempts_max


async def test_priority_and_what_is_left_of_a_deadline_go_to_the_worker(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT)
    asked = replace(job(), priority=-3, deadline_s=30.0)
    assert (await answer(service, asked))[0] == TEXT
    (request,) = service.prefill[0].requests
    assert request.priority == -3
    assert request.deadline_s is not None
    assert 0 < request.deadline_s < 30.0


@pytest.mark.parametrize("refusal", [OverLimit("full"), DeadlineExceeded("waited for its turn")])
async def test_a_deadline_ends_the_request_and_is_no_workers_fault(
    tmp_path: Path, refusal: Exception
) -> None:
    """Also where the worker is the one to see it."""

    class Late(FakePrefill):
        async def prefill(self, request: GenerationRequest) -> FirstToken:
            assert request.deadline_s is not None
            await asyncio.sleep(request.deadline_s if isinstance(refusal, DeadlineExceeded) else 0)
            raise refusal

    limits = AttemptLimits(recovery_s=5.0, retry_s=0.001, retry_s_max=0.002)
    service = fake_service(tmp_path, TEXT, limits=limits)
    service.prefill[0].prefill = Late.prefill.__get__(service.prefill[0])  # type: ignore[method-assign]
    with pytest.raises(DeadlinePassed, match=r"deadline_s of 0\.02 s"):
        await answer(service, replace(job(), deadline_s=0.02))


async def test_a_busy_worker_is_gone_around(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, prefill=2, limits=HASTY)
    service.prefill[0].refuse = OverLimit("full")
    for _ in range(8):
        assert (await answer(service, job()))[0] == TEXT


class Busy(FakePrefill):
    """Has no room for three times, and has room then."""

    async def prefill(self, request: GenerationRequest) -> FirstToken:
        self.refuse = OverLimit("full") if len(self.requests) < 3 else None
        return await super().prefill(request)


async def test_a_prompt_that_waits_for_a_worker_is_announced_once(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, prefill=0, limits=HASTY)
    worker = Busy(service.decode[0].script)
    service.backend.orchestrator.add_prefill(Member(facts("prefill-9"), worker))
    assert (await answer(service, job()))[0] == TEXT
    assert [(r.prompt_ids, r.output_ids, r.tenant) for r in worker.announced] == [((5, 6, 7), (), "default")]
    assert 'kvstrata_prefetch_announcements_total{outcome="told"} 1.0' in exposed(service)
    assert (await answer(service, job()))[0] == TEXT
    assert len(worker.announced) == 1, "one that need not wait is not announced"


class Deaf(Busy):
    """Never answers an announcement."""

    async def announce(self, request: GenerationRequest) -> None:
        self.announced.append(request)
        await asyncio.Event().wait()


async def test_no_request_waits_for_its_announcement(tmp_path: Path) -> None:
    service = fake_service(tmp_path, TEXT, prefill=0, limits=replace(HASTY, abort_s=0.01))
    deaf = Deaf(service.decode[0].script)
    service.backend.orchestrator.add_prefill(Member(facts("prefill-9"), deaf))
    assert (await answer(service, job()))[0] == TEXT
    assert len(deaf.announced) == 1
    await service.backend.orchestrator.close()
    assert 'kvstrata_prefetch_announcements_total{outcome="failed"} 1.0' in exposed(service)


def exposed(service: FakeService) -> str:
    return service.backend.metrics.exposition().decode()


class Wrong(FakePrefill):
    """Its first token is not one."""

    error: str | None = None

    async def prefill(self, request: GenerationRequest) -> FirstToken:
        self.requests.append(request)
        finish = None if self.error is None else FinishReason.ERROR
        index = 7 if self.error is None else 0
        event = TokenEvent(request.request_id, request.attempt, index, -1, finish, self.error)
        return FirstToken(event, PrefillStats(3, 0))

    async def handoff(self, request_id: str, attempt: int) -> Handoff | None:
        return None


@pytest.mark.parametrize(
    ("error", "told"), [("the logits are not finite", "logits are not finite"), (None, "token 0 was lost")]
)
async def test_a_first_token_that_is_none_fails_in_the_workers_words(
    tmp_path: Path, error: str | None, told: str
) -> None:
    service = fake_service(tmp_path, TEXT, limits=AttemptLimits(attempts_max=1))
    orchestrator = service.backend.orchestrator
    await orchestrator.remove("prefill-0", "another takes its place")
    worker = Wrong(Script([]))
    worker.error = error
    orchestrator.add_prefill(Member(facts("wrong"), worker))
    with pytest.raises(GenerationFailed, match=told):
        await answer(service, job())
    assert service.backend.metrics.dropped_events["gap"] == (error is None)


async def test_who_leaves_while_workers_are_told_to_free_leaves_nobody_untold(tmp_path: Path) -> None:
    """The first abort hangs and its waiter is cancelled: the wind-up asks again."""
    service = fake_service(tmp_path, TEXT)
    worker, asked = service.prefill[0], asyncio.Event()
    worker.refuse = RuntimeError("broken")
    told: list[int] = []

    async def abort(request_id: str, attempt: int) -> None:
        told.append(attempt)
        asked.set()
        if len(told) == 1:
            await asyncio.Event().wait()

    worker.abort = abort  # type: ignore[method-assign]
    pieces = service.backend.orchestrator.generate(job())
    first = asyncio.ensure_future(anext(pieces))
    await asyncio.wait_for(asked.wait(), 5)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await service.backend.orchestrator.close()
    assert told == [1, 1]
