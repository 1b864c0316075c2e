"""How commands reach a service: what is no URL is told with its cure, and a conversation goes on."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from cli.http import service
from kvstore.errors import ConfigError
from tests.serving import command


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("localhost:8765", "'localhost:8765' is not a URL: write http://localhost:8765"),
        ("ftp://there:1", "write http://there:1"),
        ("", "write http://HOST:PORT"),
    ],
)
def test_what_is_no_url_is_told_with_one(url: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure), service(url, None):
        pass


@pytest.mark.parametrize(
    "url", ["http://there:1", "http://there:1/", "http://there:1/v1", "http://there:1/v1/"]
)
def test_the_address_given_to_openai_clients_will_do(url: str) -> None:
    with service(url, None) as client:
        assert client.base_url == "http://there:1"


class Parrot(BaseHTTPRequestHandler):
    """Answers every chat with "Hi there" in two pieces."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._say("application/json", json.dumps({"data": [{"id": "parrot"}]}))

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens": 2}
        chunks: list[dict[str, Any]] = [
            {"choices": [{"delta": {"content": "Hi "}}]},
            {"choices": [{"delta": {"content": "there"}}]},
            {"choices": [], "usage": usage, "kvstrata": {"ttft_ms": 7.0}},
        ]
        lines = [f"data: {json.dumps(chunk)}" for chunk in chunks]
        self._say("text/event-stream", "\n\n".join([*lines, "data: [DONE]", ""]))

    def _say(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_args: object) -> None:
        """Not on standard error."""


@pytest.fixture
def parrot() -> Iterator[str]:
    Parrot.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Parrot) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_chat_goes_on_where_it_was_and_ends_with_an_empty_line(parrot: str) -> None:
    done = subprocess.run(
        command("chat", "--url", f"{parrot}/v1", "--system", "Be brief."),
        input="Hello\nAnd now?\n\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Hi there") == 2
    assert done.stderr.count("[9 prompt tokens, 4 from the store; 2 generated; first after 7 ms]") == 2
    assert [message["content"] for message in Parrot.asked[1]["messages"]] == [
        "Be brief.",
        "Hello",
        "Hi there",
        "And now?",
    ]
