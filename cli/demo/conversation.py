"""The scripted conversation: one document, a first reader with three questions, then a second reader.

The second and third turns repeat everything said before, and the second reader asks about the same
document: what they share with earlier turns is what the store is there for.
"""

from __future__ import annotations

import importlib.resources
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

ANSWER_TOKENS: Final = 32
TURN_TIMEOUT_S: Final = 120.0
QUESTIONS: Final = (
    ("first reader", "Who founded the Tidal Archive, and in which year?"),
    ("first reader", "Where are the logbooks kept that are asked for most often?"),
    ("first reader", "What happens when a page of a book is missing?"),
    ("second reader", "Who repairs the bindings of the books?"),
)

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one request cost and said. Times are the client's own, in milliseconds."""

    reader: str
    question: str
    answer: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    cached_tokens: int
    cached_by_tier: dict[str, int]
    ttft_ms: float
    total_ms: float
    misses: dict[str, int] = field(default_factory=dict)

    @property
    def decode_tokens_per_s(self) -> float:
        """Over the tokens after the first, as TPOT is measured."""
        after_first_s = (self.total_ms - self.ttft_ms) / 1000
        return (len(self.output_ids) - 1) / after_first_s if after_first_s > 0 else 0.0


def document() -> str:
    return importlib.resources.files(__package__).joinpath("document.txt").read_text(encoding="utf-8")


def opening() -> Message:
    return {"role": "system", "content": "Answer from this text.\n\n" + document()}


def ask(client: httpx.Client, model: str, reader: str, messages: list[Message]) -> Turn:
    """Stream one greedy answer and time it. Raises httpx.HTTPError, or RuntimeError in the server's words."""
    body = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    started = time.monotonic()
    first: float | None = None
    text: list[str] = []
    prompt_ids: list[int] = []
    output_ids: list[int] = []
    usage: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    with client.stream("POST", "/v1/chat/completions", json=body, timeout=TURN_TIMEOUT_S) as response:
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(f"the server answered {response.status_code}: {response.read().decode()}")
        for chunk in _events(response):
            prompt_ids += chunk.get("prompt_token_ids") or []
            usage = chunk.get("usage") or usage
            extra = chunk.get("kvstrata") or extra
            for choice in chunk["choices"]:
                text.append(choice["delta"].get("content") or "")
                output_ids += choice.get("token_ids") or []
            if first is None and output_ids:
                first = time.monotonic()
    ended = time.monotonic()
    if first is None:
        raise RuntimeError("the stream ended without a token")
    return Turn(
        reader=reader,
        question=messages[-1]["content"],
        answer="".join(text),
        prompt_ids=tuple(prompt_ids),
        output_ids=tuple(output_ids),
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        cached_by_tier=extra.get("cached_by_tier", {}),
        misses=extra.get("misses", {}),
        ttft_ms=(first - started) * 1000,
        total_ms=(ended - started) * 1000,
    )


def hold(client: httpx.Client, model: str, told: Callable[[Turn], None]) -> list[Turn]:
    """The whole script, in order. `told` is called after each turn."""
    turns: list[Turn] = []
    history: dict[str, list[Message]] = {}
    for reader, question in QUESTIONS:
        messages = history.setdefault(reader, [opening()])
        messages.append({"role": "user", "content": question})
        turn = ask(client, model, reader, messages)
        messages.append({"role": "assistant", "content": turn.answer})
        turns.append(turn)
        told(turn)
    return turns


def repeat_last(client: httpx.Client, model: str) -> Turn:
    """The second reader's question once more, word for word."""
    reader, question = QUESTIONS[-1]
    return ask(client, model, reader, [opening(), {"role": "user", "content": question}])


def shared_prefix(turn: Turn, earlier: list[Turn]) -> int:
    """How many of the turn's prompt tokens an earlier turn has had in its context, from the start on."""
    return max((_common(turn.prompt_ids, t.prompt_ids + t.output_ids) for t in earlier), default=0)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"the server broke off: {chunk['error']['message']}")
            yield chunk
