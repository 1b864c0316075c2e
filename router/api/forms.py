"""How an answer looks on the wire: OpenAI's chat and text completions, whole and in chunks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvstore.clock import wall_clock_seconds
from router.api.tally import Choice, Tally, finish_word
from router.orchestrator import Piece

__all__ = ["DONE", "ChatForm", "CompletionForm", "Form", "event"]

DONE: Final = b"data: [DONE]\n\n"

Json = dict[str, Any]


def event(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Form(Protocol):
    """One endpoint's shapes. `include_usage`: the stream ends in a chunk with usage and no choices."""

    with_ids: bool
    include_usage: bool

    def whole(self, tally: Tally) -> Json: ...

    def chunk(self, choices: list[Json]) -> Json: ...

    def opening(self, index: int, tally: Tally) -> Json | None:
        """What goes out before a choice's first token."""
        ...

    def token(self, index: int, piece: Piece) -> Json:
        """A choice that carries one token's text."""
        ...

    def ending(self, index: int, piece: Piece) -> Json:
        """A choice that says how it ended."""
        ...


@dataclass(slots=True, kw_only=True)
class _Base:
    object_name: str
    request_id: str
    model: str
    with_ids: bool
    include_usage: bool
    created: int = 0

    def __post_init__(self) -> None:
        self.created = wall_clock_seconds()

    def envelope(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": self.request_id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def ids(self, token_ids: list[int]) -> Json:
        return {"token_ids": token_ids} if self.with_ids else {}


@dataclass(slots=True, kw_only=True)
class ChatForm(_Base):
    object_name: str = "chat.completion"

    def whole(self, tally: Tally) -> Json:
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(tally.choices)]
        body = self.envelope(self.object_name, choices)
        if self.with_ids:
            body["prompt_token_ids"] = list(tally.jobs[0].prompt_ids)
        return body | {"usage": tally.usage(), "kvstrata": tally.provenance()}

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        ended = {"logprobs": None, "finish_reason": finish_word(choice.finish)}
        return {"index": index, "message": message} | ended | self.ids(choice.token_ids)

    def chunk(self, choices: list[Json]) -> Json:
        return self.envelope(self.object_name + ".chunk", choices)

    def opening(self, index: int, tally: Tally) -> Json | None:
        body = self.chunk([self._choice(index, {"role": "assistant", "content": ""})])
        if self.with_ids:
            body["prompt_token_ids"] = list(tally.jobs[index].prompt_ids)
        return body

    def token(self, index: int, piece: Piece) -> Json:
        return self._choice(index, {"content": piece.text}) | self.ids([piece.token_id])

    def ending(self, index: int, piece: Piece) -> Json:
        return self._choice(index, {}, finish_word(piece.finish))

    @staticmethod
    def _choice(index: int, delta: Json, finish: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


@dataclass(slots=True, kw_only=True)
class CompletionForm(_Base):
    object_name: str = "text_completion"

    def whole(self, tally: Tally) -> Json:
        choices = []
        for index, (job, choice) in enumerate(zip(tally.jobs, tally.choices, strict=True)):
            body = self._choice(index, "".join(choice.text), finish_word(choice.finish))
            if self.with_ids:
                body["prompt_token_ids"] = list(job.prompt_ids)
            choices.append(body | self.ids(choice.token_ids))
        usage = {"usage": tally.usage(), "kvstrata": tally.provenance()}
        return self.envelope(self.object_name, choices) | usage

    def chunk(self, choices: list[Json]) -> Json:
        return self.envelope(self.object_name, choices)

    def opening(self, index: int, tally: Tally) -> Json | None:
        if not self.with_ids:
            return None
        choice = self._choice(index, "") | {"prompt_token_ids": list(tally.jobs[index].prompt_ids)}
        return self.chunk([choice])

    def token(self, index: int, piece: Piece) -> Json:
        return self._choice(index, piece.text) | self.ids([piece.token_id])

    def ending(self, index: int, piece: Piece) -> Json:
        return self._choice(index, "", finish_word(piece.finish))

    @staticmethod
    def _choice(index: int, text: str, finish: str | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
