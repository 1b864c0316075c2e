"""`kvstrata chat`: a conversation with a running service, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from cli.http import ApiKey, Url
from cli.say import note, reported

__all__ = ["chat"]


def chat(
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the same answer.")] = 0.7,
) -> None:
    """Talk to a running service. An empty line or Ctrl-D ends it."""
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    raise typer.Exit(reported(lambda: _chat(url, api_key, system, sampling)))


def _chat(url: str, api_key: str | None, system: str | None, sampling: dict[str, Any]) -> int:
    from rich.console import Console

    from cli.http import service

    console = Console(highlight=False)
    messages = [{"role": "system", "content": system}] if system else []
    with service(url, api_key) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        note(f"{model} at {url}; an empty line ends")
        while line := _asked(console):
            messages.append({"role": "user", "content": line})
            body = {"model": model, "messages": messages, **sampling}
            answer: list[str] = []
            end: dict[str, Any] = {}
            for piece, last in _stream(client, body):
                answer.append(piece)
                end = last or end
                console.print(piece, end="", markup=False, soft_wrap=True)
            console.print()
            note(_summary(end))
            messages.append({"role": "assistant", "content": "".join(answer)})
    return 0


def _asked(console: Any) -> str:
    try:
        return str(console.input("[bold]> [/bold]")).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _stream(client: Any, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, the chunk that ends the stream or {}) in order. Raises KVStrataError."""
    from kvstore.errors import KVStrataError

    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise KVStrataError(chunk["error"]["message"])
            text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            yield text, chunk if chunk.get("usage") else {}


def _summary(end: dict[str, Any]) -> str:
    usage, extra = end["usage"], end["kvstrata"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return (
        f"[{usage['prompt_tokens']} prompt tokens, {cached} from the store; "
        f"{usage['completion_tokens']} generated; first after {extra['ttft_ms']:.0f} ms]"
    )
