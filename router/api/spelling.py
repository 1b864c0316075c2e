"""Tokens one by one, as logprobs show them: text, bytes, and OpenAI's two shapes for a list of them.

A token is not always text: it may be a part of a character. Then its text holds U+FFFD and its bytes are what
it stands for, so that a client which joins the bytes of all has the answer's. About 20 us for a token not met
lately.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from engine.tokenizer import Tokenizer
from engine.types import TokenLogprobs

__all__ = ["Scored", "Spelling"]

Json = dict[str, Any]
Scored = tuple[int, TokenLogprobs]
"""A token that was drawn, and how probable it was."""

_KEPT_MAX: Final = 8192
_NEVER: Final = -9999.0
"""For a probability of zero, whose logarithm JSON cannot write: OpenAI's own word for very unlikely."""
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class Spelling:
    """One tokenizer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(_KEPT_MAX)(self._text)
        self.octets = lru_cache(_KEPT_MAX)(self._octets)

    def chat(self, scored: Sequence[Scored]) -> Json:
        """`logprobs` of a chat's choice."""
        return {"content": [self._chat_token(*one) for one in scored], "refusal": None}

    def completion(self, scored: Sequence[Scored], offset: int) -> Json:
        """`logprobs` of a text completion's choice, its first token `offset` characters behind the start."""
        texts = [self.text(token_id) for token_id, _ in scored]
        offsets = [offset + sum(map(len, texts[:count])) for count in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [_number(logprobs.logprob) for _, logprobs in scored],
            "top_logprobs": [self._by_text(*one) for one in scored],
            "text_offset": offsets,
        }

    def _chat_token(self, token_id: int, logprobs: TokenLogprobs) -> Json:
        top = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        return self._one(token_id, logprobs.logprob) | {"top_logprobs": [self._one(*one) for one in top]}

    def _one(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self.text(token_id),
            "logprob": _number(logprob),
            "bytes": list(self.octets(token_id)),
        }

    def _by_text(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most probable ones and the one that was drawn; of those that read the same the best."""
        answer: dict[str, float] = {}
        for other, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True):
            answer.setdefault(self.text(other), _number(logprob))
        answer.setdefault(self.text(token_id), _number(logprobs.logprob))
        return answer

    def _text(self, token_id: int) -> str:
        """As it reads behind another token: some decoders drop the blank before the first."""
        alone = self._tokenizer.decode([token_id], skip_special=False)
        twice = self._tokenizer.decode([token_id, token_id], skip_special=False)
        return twice[len(alone) :] if twice.startswith(alone) and _REPLACEMENT not in twice else alone

    def _octets(self, token_id: int) -> bytes:
        text = self.text(token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        spelled = self._tokenizer.id_to_token(token_id) or ""
        if len(spelled) == 6 and spelled.startswith("<0x"):  # byte fallback's tokens
            return bytes([int(spelled[3:5], 16)])
        if all(letter in _BYTE_OF for letter in spelled):
            return bytes(_BYTE_OF[letter] for letter in spelled)
        return text.encode()


def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write a byte as one letter: a visible Latin-1 one as itself, the others, in
    order, as those from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF: Final = _byte_letters()


def _number(logprob: float) -> float:
    return max(logprob, _NEVER)
