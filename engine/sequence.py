"""One request on its way through the engine: its tokens, how far their KV is computed, when it ends.

    tokens    [ prompt .......................... | output .... ]
    computed  [ lent | onboarded blocks, tail | chunks . ]        KV is in the pool for these
    pending                                               [ ... ]  one: decode; more: prefill
    slots     [    one a block, taken as tokens come      ]

A sequence whose tokens are all computed has its next token drawn in that same step, so at least one token
is always pending: onboarding stops one short of the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from engine.detokenizer import IncrementalDetokenizer
from engine.sampling.adjust import LogitAdjuster
from engine.sampling.constraint import TokenConstraint
from engine.sampling.rows import NO_TOKEN, NOTHING_ALLOWED, Drawn, SamplingRow
from engine.speculation.drafting import Drafting
from engine.types import FinishReason, GenerationRequest, TokenEvent

__all__ = ["Sequence"]

_FAILURES: Final = {
    NO_TOKEN: "the model's logits are not finite: its weights or onboarded KV are damaged",
    NOTHING_ALLOWED: "no token is left to draw: the request's constraint and min_tokens forbid all",
}


class Sequence:
    """Mutable, the engine's own. `slots[i]` holds block i of the chain; the first `lent` of them are full
    blocks of the edge shard's, shared and never written. With `keep` it stays, ended, until it is
    released. `order` is whose turn it is: the request's priority, then who came first."""

    __slots__ = (
        "_detokenizer",
        "_end_token_ids",
        "_sampling_row",
        "computed",
        "computed_from",
        "drafting",
        "hold",
        "keep",
        "lent",
        "onboarded_blocks",
        "order",
        "parked",
        "request",
        "shares",
        "slots",
        "tokens",
        "tokens_max",
    )

    def __init__(
        self,
        request: GenerationRequest,
        *,
        slots: tuple[int, ...],
        lent: int,
        arrival: int,
        hold: bool,
        keep: bool,
        tokens_max: int,
        eos_token_ids: Iterable[int],
        detokenizer: IncrementalDetokenizer | None,
        constraint: TokenConstraint | None = None,
    ) -> None:
        """`constraint` has accepted nothing yet."""
        self.request = request
        self.tokens = [*request.prompt_ids, *request.output_ids]
        self.slots = slots
        self.lent = lent
        self.hold = hold
        self.keep = keep
        self.order = request.priority, arrival
        self.parked = False
        self.shares = True  # may others take its blocks over, and it theirs?
        self.computed = 0
        self.computed_from = 0  # the first block of which it computed every token
        self.onboarded_blocks = 0
        self.tokens_max = tokens_max
        self.drafting: Drafting | None = None  # the speculator's
        sampling = request.sampling
        self._end_token_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        )
        self._detokenizer = detokenizer
        if detokenizer is not None:
            for token_id in request.output_ids:
                detokenizer.push(token_id)
        if constraint is not None:
            for token_id in request.output_ids:
                constraint.accept(token_id)
        ends, prompt_len = frozenset(eos_token_ids) | set(sampling.stop_token_ids), len(request.prompt_ids)
        adjuster = LogitAdjuster(sampling, prompt_len, ends)
        self._sampling_row = SamplingRow(sampling, self.tokens, prompt_len, ends, adjuster, constraint)

    @property
    def own_slots(self) -> tuple[int, ...]:
        """Those that it gives back when it goes; the others are whose who lent them."""
        return self.slots[self.lent :]

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def output_count(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    def onboard(self, tokens: int, block_tokens: int) -> None:
        """KV of the first `tokens` tokens is in the pool."""
        self.onboarded_blocks = tokens // block_tokens
        self.computed_from = -(-tokens // block_tokens)
        self.computed = min(tokens, len(self.tokens) - 1)

    def slots_for(self, rows: int, block_tokens: int) -> int:
        """Slots that the next `rows` tokens take beyond those it has."""
        return -(-(self.computed + rows) // block_tokens) - len(self.slots)

    def writes_to_shared(self, block_tokens: int, is_shared: Callable[[int], bool]) -> bool:
        """Would its next token go into a block that others read? It must be copied first."""
        index, inside = divmod(self.computed, block_tokens)
        return inside > 0 and is_shared(self.slots[index])

    def take_over(self, slot: int, tokens: int) -> None:
        """The next `tokens` tokens are in `slot`, computed by another."""
        self.slots += (slot,)
        self.computed += tokens

    def so_far(self) -> GenerationRequest:
        """The request that goes on where this one stands."""
        prompt = len(self.request.prompt_ids)
        return replace(self.request, output_ids=tuple(self.tokens[prompt:]))

    def advance(self, rows: int, block_tokens: int) -> range:
        """`rows` more tokens are computed; the blocks that became full by it."""
        before, self.computed = self.computed, self.computed + rows
        first = max(before // block_tokens, self.onboarded_blocks)
        return range(first, self.computed // block_tokens)

    def draft_room(self, block_tokens: int) -> int:
        """Drafts that could become tokens, the last of all aside, and have a place in the slots at hand."""
        return min(self.tokens_max - 1, len(self.slots) * block_tokens) - len(self.tokens)

    def sampling_rows(self, drafts: tuple[int, ...]) -> list[SamplingRow]:
        """Who the next token is drawn for, and the one behind each draft if it and those before it are right.
        The first sees `tokens` as they are when it is used."""
        own = self._sampling_row
        guessed = [
            replace(own, tokens=[*self.tokens, *drafts[: i + 1]], drafts=i + 1) for i in range(len(drafts))
        ]
        return [own, *guessed]

    def accept(self, drawn: Iterable[Drawn], drafts: Iterable[int]) -> list[TokenEvent]:
        """Take what was drawn, up to the first that is not the draft behind it, or ends the sequence: one
        event each. It has ended if the last has a finish."""
        events: list[TokenEvent] = []
        for each, draft in zip(drawn, (*drafts, None), strict=False):
            events.append(self._append(each))
            if events[-1].finish is not None or each.token_id != draft:
                break
        return events

    def _append(self, drawn: Drawn) -> TokenEvent:
        request, index, token_id = self.request, self.output_count, drawn.token_id
        if token_id in _FAILURES:
            self.shares = False  # who knows since when its KV is damaged
            finish, what = FinishReason.ERROR, _FAILURES[token_id]
            return TokenEvent(request.request_id, request.attempt, index, -1, finish, what)
        self.tokens.append(token_id)
        if self._sampling_row.constraint is not None:
            self._sampling_row.constraint.accept(token_id)
        return TokenEvent(
            request.request_id,
            request.attempt,
            index,
            token_id,
            self._finish(token_id),
            logprobs=drawn.logprobs,
        )

    def _finish(self, token_id: int) -> FinishReason | None:
        if token_id in self._end_token_ids:
            return FinishReason.STOP
        if self._detokenizer is not None:
            self._detokenizer.push(token_id)
            if self._detokenizer.finished_by_stop:
                return FinishReason.STOP
        if len(self.tokens) >= self.tokens_max:
            return FinishReason.LENGTH
        return None
