"""The real service on the default model: the openai client, hits of the store, workers killed on the way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.router.conformance import HELLO, TIMEOUT_S, Conformance, client
from tests.serving import Up, running

pytestmark = [pytest.mark.serving, pytest.mark.model, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
STORY: list[Any] = [{"role": "user", "content": "Tell me a long story about a lighthouse. " * 8}]


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    """Without the pools' own caches: these tests look at what the store does."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KVSTRATA_ENGINE__LOCAL_CACHE", "false")
        with running("--model", MODEL, "--shards", "2") as service:
            yield service


def wait_until(what: str, true: Callable[[], bool], within_s: float = 60.0) -> None:
    pause = threading.Event()
    for _ in range(int(within_s / 0.25)):
        if true():
            return
        pause.wait(0.25)
    pytest.fail(f"not within {within_s:.0f} s: {what}")


@pytest.fixture(autouse=True)
def ready(up: Up) -> None:
    """What the test before killed is back: until then the service says 503, and should."""
    wait_until("the service is ready", lambda: httpx.get(f"{up.url}/health").status_code == 200)


class TestRealService(Conformance):
    @pytest.fixture
    def url(self, up: Up) -> str:
        return up.url

    @pytest.fixture
    def model(self, up: Up) -> str:
        return up.model


def ask(url: str, messages: list[Any], **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def test_a_second_turn_finds_the_first_in_the_store(up: Up) -> None:
    first = ask(up.url, STORY)
    text = first["choices"][0]["message"]["content"]
    turn = [*STORY, {"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    second = ask(up.url, turn)
    shared = first["usage"]["prompt_tokens"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= shared - shared % 32
    assert second["kvstrata"]["cached_by_tier"] == {"host": cached}
    assert second["kvstrata"]["epochs"] == [0]


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_killed_while_it_streams_changes_nothing(up: Up, role: str) -> None:
    messages: list[Any] = [{"role": "user", "content": f"Count and explain, for the {role} worker."}]
    shaped: dict[str, Any] = {
        "temperature": 0.8,
        "seed": 5,
        "presence_penalty": 0.5,
        "max_tokens": 20,
        "logprobs": True,
    }
    undisturbed = ask(up.url, messages, **shaped, ignore_eos=True)["choices"][0]
    (victim,) = [worker for worker in up.status()["workers"] if worker["role"] == role]
    pieces: list[str] = []
    tokens: list[Any] = []
    with client(up.url) as openai_client:
        stream = openai_client.chat.completions.create(
            model=MODEL,
            messages=messages,
            **shaped,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for number, chunk in enumerate(stream):
            if number == 3:
                os.kill(victim["pid"], signal.SIGKILL)
            (choice,) = chunk.choices
            pieces.append(choice.delta.content or "")
            tokens.extend(choice.logprobs.content or [] if choice.logprobs else [])
    assert "".join(pieces) == undisturbed["message"]["content"]
    assert [token.model_dump() for token in tokens] == undisturbed["logprobs"]["content"]

    def replaced() -> bool:
        (worker,) = [worker for worker in up.status()["workers"] if worker["role"] == role]
        return bool(worker["state"] == "running" and worker["starts"] > victim["starts"])

    wait_until(f"another {role} worker runs", replaced)
    assert ask(up.url, messages)["choices"][0]["message"]["content"]


def test_a_killed_shard_costs_misses_and_comes_back(up: Up) -> None:
    before = ask(up.url, STORY)
    victim = up.status()["shards"][0]
    os.kill(victim["pid"], signal.SIGKILL)
    after = ask(up.url, STORY)
    assert after["choices"][0]["message"] == before["choices"][0]["message"]

    def back() -> bool:
        shard = up.status()["shards"][0]
        return bool(shard["state"] == "running" and shard["pid"] != victim["pid"])

    wait_until("the shard is back", back)
    shard = up.status()["shards"][0]
    assert shard["starts"] == victim["starts"] + 1
    assert shard["incarnation"] != victim["incarnation"]
    ask(up.url, STORY)
    again = ask(up.url, STORY)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_long_prefill_is_left_when_the_client_leaves(up: Up) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{up.url}/v1/completions",
            json={"model": MODEL, "prompt": "left " * 2500, "max_tokens": 8},
            timeout=0.5,
        )
    assert ask(up.url, HELLO)["usage"]["completion_tokens"] > 0
    wait_until("the request is forgotten", lambda: up.status()["requests_running"] == 0)
    assert up.status()["ownerless_bytes"] == 0
