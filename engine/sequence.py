"""One request on its way through the engine: its tokens, how far their KV is computed, when it ends.

    tokens    [ prompt .......................... | output .... ]
    computed  [ lent | onboarded blocks, tail | chunks . ]        KV is in the pool for these
    pending                                               [ ... ]  one: decode; more: prefill

A sequence whose tokens are all computed has its next token drawn in that same step, so at least one token
is always pending: onboarding stops one short of the end.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.detokenizer import IncrementalDetokenizer
from engine.sampling.rows import Drawn, SamplingRow
from engine.types import FinishReason, GenerationRequest, TokenEvent

__all__ = ["Sequence"]


class Sequence:
    """Mutable, the engine's own. `slots[i]` holds block i of the chain; the first `lent` of them are full
    blocks of the edge shard's, shared and never written. With `keep` it stays, ended, until it is
    released."""

    __slots__ = (
        "_detokenizer",
        "_end_token_ids",
        "_tokens_max",
        "computed",
        "hold",
        "keep",
        "lent",
        "onboarded_blocks",
        "parked",
        "request",
        "slots",
        "tokens",
    )

    def __init__(
        self,
        request: GenerationRequest,
        *,
        slots: tuple[int, ...],
        lent: int,
        hold: bool,
        keep: bool,
        tokens_max: int,
        eos_token_ids: Iterable[int],
        detokenizer: IncrementalDetokenizer | None,
    ) -> None:
        self.request = request
        self.tokens = [*request.prompt_ids, *request.output_ids]
        self.slots = slots
        self.lent = lent
        self.hold = hold
        self.keep = keep
        self.parked = False
        self.computed = 0
        self.onboarded_blocks = 0
        sampling = request.sampling
        self._tokens_max = tokens_max
        self._end_token_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        )
        self._detokenizer = detokenizer
        if detokenizer is not None:
            for token_id in request.output_ids:
                detokenizer.push(token_id)

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

    def onboard(self, blocks: int, tokens: int) -> None:
        """KV of the first `tokens` tokens, of which `blocks` are full blocks, is in the pool."""
        self.onboarded_blocks = blocks
        self.computed = min(tokens, len(self.tokens) - 1)

    def advance(self, rows: int, block_tokens: int) -> range:
        """`rows` more tokens are computed; the blocks that became full by it."""
        before, self.computed = self.computed, self.computed + rows
        first = max(before // block_tokens, self.onboarded_blocks)
        return range(first, self.computed // block_tokens)

    def sampling_row(self) -> SamplingRow:
        """Who the next token is drawn for. It sees `tokens` as they are when it is used."""
        return SamplingRow(self.request.sampling, self.tokens, len(self.request.prompt_ids))

    def append(self, drawn: Drawn) -> TokenEvent:
        """Take the token that was drawn. The sequence has ended if the event has a finish."""
        index = self.output_count
        self.tokens.append(drawn.token_id)
        return TokenEvent(
            self.request.request_id,
            self.request.attempt,
            index,
            drawn.token_id,
            self._finish(drawn.token_id),
            logprobs=drawn.logprobs,
        )

    def fail(self, what: str) -> TokenEvent:
        return TokenEvent(
            self.request.request_id, self.request.attempt, self.output_count, -1, FinishReason.ERROR, what
        )

    def _finish(self, token_id: int) -> FinishReason | None:
        if token_id in self._end_token_ids:
            return FinishReason.STOP
        if self._detokenizer is not None:
            self._detokenizer.push(token_id)
            if self._detokenizer.finished_by_stop:
                return FinishReason.STOP
        if len(self.tokens) >= self._tokens_max:
            return FinishReason.LENGTH
        return None
