"""How an answer looks on the wire: OpenAI's chat and text completions, whole and in chunks."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from engine.types import FinishReason
from kvstore.clock import wall_clock_seconds
from router.api.spelling import Scored, Spelling
from router.api.tally import Tally, finish_word
from router.orchestrator import Piece

__all__ = ["DONE", "ChatForm", "CompletionForm", "Form", "event"]

DONE: Final = b"data: [DONE]\n\n"

Json = dict[str, Any]


def event(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(slots=True, kw_only=True)
class Form(ABC):
    """One endpoint's shapes, for one request. `include_usage`: the stream ends in a chunk with usage and no
    choices."""

    request_id: str
    model: str
    spelling: Spelling
    with_ids: bool
    include_usage: bool
    created: int = field(default_factory=wall_clock_seconds)

    @abstractmethod
    def whole(self, tally: Tally) -> Json: ...

    @abstractmethod
    def chunk(self, choices: list[Json]) -> Json: ...

    @abstractmethod
    def opening(self, index: int, tally: Tally) -> Json | None:
        """What goes out before a choice's first token."""

    @abstractmethod
    def token(self, index: int, piece: Piece) -> Json:
        """A choice that carries one token's text, and its logprobs if it has some."""

    @abstractmethod
    def ending(self, index: int, piece: Piece) -> Json:
        """A choice that says how it ended."""

    def _envelope(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": self.request_id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _ids(self, token_ids: list[int]) -> Json:
        return {"token_ids": token_ids} if self.with_ids else {}


@dataclass(slots=True, kw_only=True)
class ChatForm(Form):
    def whole(self, tally: Tally) -> Json:
        choices = []
        for index, (job, choice) in enumerate(zip(tally.jobs, tally.choices, strict=True)):
            message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
            logprobs = None if job.sampling.logprobs is None else self.spelling.chat(choice.scored)
            body = _choice(index, {"message": message}, logprobs, choice.finish)
            choices.append(body | self._ids(choice.token_ids))
        body = self._envelope("chat.completion", choices)
        if self.with_ids:
            body["prompt_token_ids"] = list(tally.jobs[0].prompt_ids)
        return body | {"usage": tally.usage(), "kvstrata": tally.provenance()}

    def chunk(self, choices: list[Json]) -> Json:
        return self._envelope("chat.completion.chunk", choices)

    def opening(self, index: int, tally: Tally) -> Json | None:
        body = self.chunk([_choice(index, {"delta": {"role": "assistant", "content": ""}})])
        if self.with_ids:
            body["prompt_token_ids"] = list(tally.jobs[index].prompt_ids)
        return body

    def token(self, index: int, piece: Piece) -> Json:
        scored = _scored(piece)
        logprobs = self.spelling.chat(scored) if scored else None
        return _choice(index, {"delta": {"content": piece.text}}, logprobs) | self._ids([piece.token_id])

    def ending(self, index: int, piece: Piece) -> Json:
        return _choice(index, {"delta": {}}, finish=piece.finish)


@dataclass(slots=True, kw_only=True)
class CompletionForm(Form):
    _offsets: Counter[int] = field(default_factory=Counter)  # choice -> characters of its tokens so far

    def whole(self, tally: Tally) -> Json:
        choices = []
        for index, (job, choice) in enumerate(zip(tally.jobs, tally.choices, strict=True)):
            logprobs = None if job.sampling.logprobs is None else self.spelling.completion(choice.scored, 0)
            body = _choice(index, {"text": "".join(choice.text)}, logprobs, choice.finish)
            if self.with_ids:
                body["prompt_token_ids"] = list(job.prompt_ids)
            choices.append(body | self._ids(choice.token_ids))
        usage = {"usage": tally.usage(), "kvstrata": tally.provenance()}
        return self.chunk(choices) | usage

    def chunk(self, choices: list[Json]) -> Json:
        return self._envelope("text_completion", choices)

    def opening(self, index: int, tally: Tally) -> Json | None:
        if not self.with_ids:
            return None
        choice = _choice(index, {"text": ""}) | {"prompt_token_ids": list(tally.jobs[index].prompt_ids)}
        return self.chunk([choice])

    def token(self, index: int, piece: Piece) -> Json:
        scored, logprobs = _scored(piece), None
        if scored:
            logprobs = self.spelling.completion(scored, self._offsets[index])
            self._offsets[index] += len(self.spelling.text(piece.token_id))
        return _choice(index, {"text": piece.text}, logprobs) | self._ids([piece.token_id])

    def ending(self, index: int, piece: Piece) -> Json:
        return _choice(index, {"text": ""}, finish=piece.finish)


def _choice(index: int, said: Json, logprobs: Json | None = None, finish: FinishReason | None = None) -> Json:
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_word(finish)}


def _scored(piece: Piece) -> Sequence[Scored]:
    return () if piece.logprobs is None else [(piece.token_id, piece.logprobs)]
