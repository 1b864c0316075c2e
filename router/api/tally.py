"""What an answer adds up to while its pieces pass: text, tokens, usage, and where the KV came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from engine.types import FinishReason
from kvstore.clock import Clock
from router.api.spelling import Scored
from router.attempts import Job
from router.orchestrator import Piece

__all__ = ["Choice", "Tally", "finish_word"]

_FINISH: Final = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def finish_word(reason: FinishReason | None) -> str | None:
    """OpenAI's word for the reason."""
    return None if reason is None else _FINISH[reason]


@dataclass(slots=True)
class Choice:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish: FinishReason | None = None


class Tally:
    """Of one HTTP request, which may have several prompts and `n` choices of each, side by side."""

    def __init__(self, jobs: Sequence[Job], clock: Clock, n: int = 1) -> None:
        self.jobs = jobs
        self._n = n
        self.choices = [Choice() for _ in jobs]
        self._clock = clock
        self._began = clock.now()
        self._ttft_s: float | None = None
        self._cached = 0
        self._by_tier: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._epochs: set[int] = set()

    def add(self, index: int, piece: Piece) -> None:
        if self._ttft_s is None:
            self._ttft_s = self._clock.now() - self._began
        choice = self.choices[index]
        choice.text.append(piece.text)
        choice.token_ids.append(piece.token_id)
        choice.finish = piece.finish
        if piece.logprobs is not None:
            choice.scored.append((piece.token_id, piece.logprobs))
        self._epochs.update(piece.epochs)
        if piece.stats is not None:
            self._epochs.update(piece.stats.epochs)
        if piece.stats is not None and index % self._n == 0:
            self._cached += piece.stats.cached_tokens
            self._by_tier.update(piece.stats.cached_by_tier)
            self._misses.update(piece.stats.misses)

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has; cached is what its first choice found."""
        prompt = sum(len(job.prompt_ids) for job in self.jobs[:: self._n])
        completion = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def provenance(self) -> dict[str, Any]:
        """The extra field `kvstrata`: what this answer cost and which epochs' KV it used."""
        return {
            "ttft_ms": None if self._ttft_s is None else round(self._ttft_s * 1000, 3),
            "cached_by_tier": dict(self._by_tier),
            "misses": dict(self._misses),
            "epochs": sorted(self._epochs),
        }
