"""What only a scripted service can show: overload, failures, keys, bounds, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

from engine.types import TokenEvent
from kvstore.errors import OverLimit, Unavailable
from router.api.app import build_app
from router.api.gate import Gate
from router.api.schemas import ChatBody
from router.attempts import AttemptLimits
from tests.router.conformance import HELLO, client
from tests.router.conftest import BODY_NBYTES_MAX, LiveServer
from tests.router.fakes import MODEL, fake_service

ASK = {"model": MODEL, "messages": HELLO, "temperature": 0}
Make = Callable[..., LiveServer]


def events(body: str) -> list[object]:
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_the_last_word_of_a_stream_is_done(live: LiveServer) -> None:
    body = httpx.post(f"{live.url}/v1/chat/completions", json=ASK | {"stream": True}).text
    told = events(body)
    assert told[-1] == "[DONE]"
    last = told[-2]
    assert isinstance(last, dict)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["kvstrata"]["epochs"] == [1]


def test_a_wrong_key_is_401(live_with: Make) -> None:
    server = live_with(api_key="secret")
    with client(server.url, "guess") as wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with client(server.url, "secret") as right:
        assert right.models.list().data
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_too_large_a_body_is_413(live: LiveServer) -> None:
    def pieces() -> object:
        yield b" " * BODY_NBYTES_MAX
        yield b" "

    for content in (b" " * (BODY_NBYTES_MAX + 1), pieces()):
        answer = httpx.post(f"{live.url}/v1/chat/completions", content=content)  # type: ignore[arg-type]
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
    assert httpx.post(f"{live.url}/v1/chat/completions", json=ASK).status_code == 200


async def test_a_body_that_does_not_come_is_408() -> None:
    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    gate = Gate(unreachable, api_key=None, body_nbytes_max=10, body_timeout_s=0.01)
    await gate({"type": "http", "path": "/tokenize", "headers": []}, never, send)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"


def rejections(server: LiveServer, reason: str) -> float:
    counter = server.service.backend.metrics.admission_rejections
    (family,) = counter.collect()
    return sum(s.value for s in family.samples if s.labels == {"reason": reason} and "total" in s.name)


def test_more_prompts_than_ever_run_at_once_are_the_clients_error(live_with: Make) -> None:
    server = live_with(running_max=1)
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": ["a", "b"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert "send fewer prompts" in answer.json()["error"]["message"]


def test_more_choices_than_ever_run_at_once_name_n(live_with: Make) -> None:
    server = live_with(running_max=3)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {"n": 4})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"
    assert httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {"n": 3}).status_code == 200


def test_choices_of_a_client_that_leaves_are_all_freed(live_with: Make) -> None:
    server = live_with()
    decode = server.service.decode[0]
    decode.silent_after = 1
    freed: set[str] = set()
    all_freed = server.call(asyncio.Event)

    async def abort(request_id: str, attempt: int) -> None:
        freed.add(request_id)
        if len(freed) == 3:
            all_freed.set()

    decode.abort = abort  # type: ignore[method-assign]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {"n": 3}, timeout=0.5)
    asyncio.run_coroutine_threadsafe(asyncio.wait_for(all_freed.wait(), 10), server.loop).result(12)
    assert server.call(lambda: server.service.backend.orchestrator.running) == 0


def test_one_choice_that_must_go_on_elsewhere_does_so_by_itself(live_with: Make) -> None:
    """The only decode worker says the tokens of one choice's first attempt wrongly, then rightly."""
    server = live_with()
    decode, spoiled = server.service.decode[0], set[str]()

    def spoil(log: list[TokenEvent]) -> list[TokenEvent]:
        spoiled.add(log[0].request_id) if not spoiled else None
        return [
            replace(event, index=event.index + 9)
            if event.request_id in spoiled and event.attempt == 1 and event.index == 3
            else event
            for event in log
        ]

    decode.mangle = spoil
    asked = ASK | {"n": 3, "logprobs": True, "top_logprobs": 1}
    choices = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=30).json()["choices"]
    assert {choice["message"]["content"] for choice in choices} == {"The tide."}
    tokens = [[token["token"] for token in choice["logprobs"]["content"]] for choice in choices]
    assert tokens[0] == tokens[1] == tokens[2]
    attempts = {(handoff.request.request_id, handoff.request.attempt) for handoff in decode.started}
    assert len(attempts) == 4


def test_overload_is_429_with_retry_after(live_with: Make) -> None:
    server = live_with(running_max=1)
    other = server.service.backend.orchestrator.admit()
    server.call(other.__enter__)
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "a"})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert rejections(server, "running_max") == 1.0
    server.call(lambda: other.__exit__(None, None, None))
    assert httpx.post(f"{server.url}/v1/chat/completions", json=ASK).status_code == 200


def test_not_ready_is_503(live_with: Make) -> None:
    server = live_with()
    server.call(lambda: setattr(server.service.operations, "reason", "starting shard 1/2"))
    assert httpx.get(f"{server.url}/health").status_code == 503
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK)
    assert answer.status_code == 503
    assert "starting shard" in answer.json()["error"]["message"]
    assert rejections(server, "not_ready") == 1.0


def test_a_failure_before_the_first_token_has_a_status_also_when_streaming(live_with: Make) -> None:
    server = live_with()
    server.service.prefill[0].refuse = RuntimeError("the pool is broken")
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {"stream": stream})
        assert answer.status_code == 500
        assert "Traceback" not in answer.text
        assert "3 attempts failed" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"), [(OverLimit("full"), 429, "1"), (Unavailable("draining"), 503, "2")]
)
def test_workers_that_stay_busy_are_told_apart_from_failures(
    live_with: Make, refusal: Exception, status: int, retry_after: str
) -> None:
    server = live_with(limits=AttemptLimits(recovery_s=0.02, retry_s=0.001))
    server.service.prefill[0].refuse = refusal
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {"stream": stream})
        assert answer.status_code == status
        assert answer.headers["retry-after"] == retry_after
        assert str(refusal) in answer.json()["error"]["message"]


def test_a_failure_after_it_is_an_event_of_the_stream(live_with: Make) -> None:
    server = live_with(limits=AttemptLimits(attempts_max=1))
    server.service.decode[0].dies_after = 1
    with client(server.url) as openai_client, pytest.raises(openai.APIError, match="attempts failed"):
        for _ in openai_client.chat.completions.create(**ASK, stream=True):  # type: ignore[call-overload]
            pass


def test_a_bug_of_ours_is_500_without_a_traceback(live_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = live_with()

    def broken(_: object) -> list[int]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.service.backend.tokenizer, "encode_chat", broken)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=60)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal_error"
    assert "secret" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_workers(live_with: Make, stream: bool) -> None:
    server = live_with()
    server.service.decode[0].silent_after = 1
    freed = server.call(asyncio.Event)

    async def abort(request_id: str, attempt: int) -> None:
        freed.set()

    server.service.decode[0].abort = abort  # type: ignore[method-assign]
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=ASK | {"stream": stream}, timeout=0.5
        ) as answer,
    ):
        answer.read()
    asyncio.run_coroutine_threadsafe(asyncio.wait_for(freed.wait(), 10), server.loop).result(12)
    assert server.call(lambda: server.service.backend.orchestrator.running) == 0


async def test_a_client_that_stops_reading_gives_its_place_back(tmp_path: Path) -> None:
    service = fake_service(tmp_path, send_timeout_s=0.02)
    app = build_app(service.backend, api_key=None, body_nbytes_max=BODY_NBYTES_MAX)
    body = json.dumps({"model": MODEL, "prompt": "a", "stream": True}).encode()
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    await asyncio.wait_for(app(scope, receive, send), 5)
    assert sent[0]["status"] == 200
    assert not any(message.get("more_body") is False for message in sent)  # the server breaks it off
    assert service.backend.orchestrator.running == 0


def test_metrics_fold_counters_of_all_workers(live_with: Make) -> None:
    server = live_with()
    server.service.prefill[0].cached = 5
    httpx.post(f"{server.url}/v1/chat/completions", json=ASK)
    for _ in range(2):  # a second scrape adds nothing
        metrics = httpx.get(f"{server.url}/metrics").text
        assert "kvstrata_verified_blocks_total 7.0" in metrics
        assert 'kvstrata_rejected_blocks_total{reason="checksum"} 1.0' in metrics
        assert 'kvstrata_misses_total{reason="absent"} 2.0' in metrics
        assert 'kvstrata_cached_tokens_total{tier="host"} 5.0' in metrics
        assert "kvstrata_time_to_first_token_seconds_count 1.0" in metrics


async def test_totals_never_go_back_when_a_worker_restarts(tmp_path: Path) -> None:
    totals = fake_service(tmp_path).backend.metrics.totals
    totals.fold("w-1", {"verified_blocks": 10.0})
    totals.forget("w-1")
    totals.fold("w-2", {"verified_blocks": 2.0})
    totals.fold("w-2", {"verified_blocks": 3.0})
    assert totals.workers["verified_blocks"] == 13.0


async def test_a_chat_without_max_tokens_ends_after_the_default(tmp_path: Path) -> None:
    backend = replace(fake_service(tmp_path).backend, max_tokens_default=3)
    for asked, tokens in ({}, 3), ({"max_tokens": 7}, 7):
        body = ChatBody.model_validate(ASK | asked)
        (job,) = await backend.chat_jobs(body)
        assert job.sampling.max_tokens == tokens


async def test_an_answer_that_was_overtaken_counts_nothing_twice(tmp_path: Path) -> None:
    totals = fake_service(tmp_path).backend.metrics.totals
    for count in (10.0, 7.0, 10.0, 11.0):
        totals.fold("w-1", {"verified_blocks": count})
    assert totals.workers["verified_blocks"] == 11.0
