"""A wrong body is told in words a client's author knows, with the field and what to send instead."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.router.conformance import HELLO
from tests.router.conftest import LiveServer
from tests.router.fakes import MODEL

JSON = "application/json"
ASK: dict[str, Any] = {"model": MODEL, "messages": HELLO}


def told(live: LiveServer, body: bytes, kind: str = JSON) -> str:
    headers = {"content-type": kind}
    answer = httpx.post(f"{live.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    return str(answer.json()["error"]["message"])


def test_the_body_as_a_whole(live: LiveServer) -> None:
    not_an_object = "the body must be a JSON object, sent as application/json"
    assert told(live, b"") == "the body is empty: send a JSON object"
    assert told(live, b"[1]") == not_an_object
    assert told(live, json.dumps(ASK).encode(), "text/plain") == not_an_object
    assert told(live, b"{").startswith("the body is not valid JSON: ")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"messages": []}, "messages: is empty: send at least 1"),
        ({"temperature": -1}, "temperature: must be at least 0.0 (got -1)"),
        ({"temperature": 3}, "temperature: must be at most 2.0 (got 3)"),
        ({"temperature": "warm"}, 'temperature: must be a number (got "warm")'),
        ({"max_tokens": "many"}, 'max_tokens: must be a whole number (got "many")'),
        ({"stream": "yes"}, 'stream: must be true or false (got "yes")'),
        ({"messages": "Hello"}, 'messages: must be a list (got "Hello")'),
        ({"model": 7}, "model: must be a string (got 7)"),
        (
            {"messages": [{"role": "boss", "content": "?"}]},
            "messages[0].role: must be 'system', 'developer', 'user' or 'assistant' (got \"boss\")",
        ),
    ],
)
def test_a_field(live: LiveServer, wrong: dict[str, Any], says: str) -> None:
    assert told(live, json.dumps(ASK | wrong).encode()) == says


def test_a_field_that_is_not_there(live: LiveServer) -> None:
    assert told(live, json.dumps({"model": MODEL}).encode()) == "messages: is missing: send it"
