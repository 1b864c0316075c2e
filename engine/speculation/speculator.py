"""Which guesses a step verifies.

    draft(chunks)             a decoding sequence's row gets a draft behind it, where there is one that pays
    verified(chunk, drawn)    what was drawn in its place
    observe(chunks, seconds)  what the step took

Drafts take what is left: rows of the step's budget, places in slots that their sequence has. No slot is
taken for them and nobody waits for them. What they cost and bring is measured (payoff.py); where it does not
pay, one guess is tried in `RETRY_AFTER` chances, to see whether that has changed.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Final, NamedTuple

import torch

from engine.batch import Chunk
from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.sequence import Sequence
from engine.speculation.base import Draft, DrafterFactory
from engine.speculation.drafting import Drafting, Experience
from engine.speculation.ngram import NGramDrafter
from engine.speculation.payoff import StepCost, allot

__all__ = ["Speculator", "make_speculator"]

RETRY_AFTER: Final = 32


class Speculator:
    """One engine's, owned by its thread."""

    def __init__(self, make_drafter: DrafterFactory, config: EngineConfig, model_config: ModelConfig) -> None:
        self._make_drafter = make_drafter
        self._draft_tokens_max = config.draft_tokens_max
        self._step_tokens_max = config.step_tokens_max
        self._block_tokens = config.block_tokens
        self._vocab_size = model_config.vocab_size
        self._experience = Experience()
        self._cost = StepCost()

    def draft(self, chunks: Seq[Chunk], rows_max: int | None = None) -> list[Chunk]:
        """The same chunks, some with drafts: at most `rows_max` rows in all; None: as any step has."""
        rows, tokens = sum(chunk.rows for chunk in chunks), sum(chunk.draws for chunk in chunks)
        rows_max = self._step_tokens_max if rows_max is None else rows_max
        budget, fixed_rows = max(0, rows_max - rows), self._cost.fixed_rows
        offers = []
        for index, chunk in enumerate(chunks):
            room = min(self._room(chunk), budget)
            if room > 0:
                state = self._state(chunk.sequence)
                (wanted,) = allot([[state.best_chance] * room], tokens, rows, fixed_rows, budget)
                offers.append(_Offer(index, state, self._propose(state, chunk.sequence, wanted)))
        lengths = allot([offer.chances for offer in offers], tokens, rows, fixed_rows, budget)
        left = budget - sum(lengths)
        drafted = list(chunks)
        for (at, state, draft), length in zip(offers, lengths, strict=True):
            retried = int(not length and bool(draft.tokens) and state.passed_over >= RETRY_AFTER and left > 0)
            left -= retried
            verified = draft.tokens[: length + retried]
            state.passed_over = 0 if verified else state.passed_over + 1
            drafted[at] = chunks[at]._replace(drafts=tuple(verified))
        return drafted

    def verified(self, chunk: Chunk, drawn: Seq[int]) -> None:
        """`drawn` is what the sequence took: what stood in its draft behind the first wrong guess, or behind
        the sequence's end, says nothing."""
        verdicts = [token == draft for token, draft in zip(drawn, chunk.drafts, strict=False)]
        self._state(chunk.sequence).learn(verdicts)

    def observe(self, chunks: Seq[Chunk], seconds: float) -> None:
        """Steps with prompts in them say nothing: few of a prompt's rows need logits."""
        if all(chunk.rows == 1 for chunk in chunks):
            self._cost.observe(sum(1 + len(chunk.drafts) for chunk in chunks), seconds)

    def _room(self, chunk: Chunk) -> int:
        """Places for drafts. A sequence that parks after its next token has none."""
        sequence = chunk.sequence
        if chunk.rows > 1 or not chunk.draws or sequence.hold:
            return 0
        return min(self._draft_tokens_max, sequence.draft_room(self._block_tokens))

    def _state(self, sequence: Sequence) -> Drafting:
        if sequence.drafting is None:
            sequence.drafting = Drafting(self._make_drafter(), self._experience)
        return sequence.drafting

    def _propose(self, state: Drafting, sequence: Sequence, wanted: int) -> Draft:
        if not wanted and state.passed_over < RETRY_AFTER:
            return Draft()
        return state.propose(sequence.tokens, wanted or 1, self._vocab_size)


def make_speculator(
    config: EngineConfig, model_config: ModelConfig, make_drafter: DrafterFactory | None, device: torch.device
) -> Speculator | None:
    """With this drafter, or the one that the configuration means on this device, if any."""
    by_itself = config.speculation == "auto" and device.type == "cpu"
    if make_drafter is None and (by_itself or config.speculation == "ngram"):
        make_drafter = NGramDrafter
    return None if make_drafter is None else Speculator(make_drafter, config, model_config)


class _Offer(NamedTuple):
    at: int  # of the chunk
    state: Drafting
    draft: Draft

    @property
    def chances(self) -> list[float]:
        return self.state.chances(self.draft.grades)
