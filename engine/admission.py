"""What a request must be to enter an engine, and how much of the pool it will want."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from engine.prediction import OutputPrediction
from engine.sequence import Sequence
from engine.types import GenerationRequest, TailKV
from kvstore.errors import ConfigError, OverLimit

__all__ = ["BlockDemand", "check_onboarded", "check_request", "fitting_model_len"]

log = structlog.get_logger(__name__)


class BlockDemand:
    """Blocks wanted now and, by the mean of those before, later. One engine's."""

    def __init__(self, block_tokens: int, max_model_len: int) -> None:
        self.prediction = OutputPrediction()
        self._block_tokens = block_tokens
        self._max_model_len = max_model_len

    def tokens_max(self, request: GenerationRequest) -> int:
        """Where it ends at the latest."""
        return min(len(request.prompt_ids) + request.sampling.max_tokens, self._max_model_len)

    def of(self, request: GenerationRequest, hold: bool) -> int:
        """Blocks it is expected to have in the end, lent ones included."""
        known = len(request.prompt_ids) + len(request.output_ids)
        return self._blocks(known, self.tokens_max(request), hold)

    def promised(self, sequences: Iterable[Sequence]) -> int:
        """Slots that those who run are expected to take yet: free ones, but not for others."""
        return sum(
            max(0, self._blocks(len(s.tokens), s.tokens_max, s.hold) - len(s.slots))
            for s in sequences
            if not s.parked
        )

    def over_limit(
        self, request: GenerationRequest, hold: bool, unclaimed: int, running: int, running_max: int
    ) -> OverLimit:
        """What to say to one that does not fit now, or never will."""
        known = len(request.prompt_ids) + len(request.output_ids)
        what = f"request {request.request_id} of {known} tokens"
        if known >= self._max_model_len:
            return OverLimit(f"{what} leaves no room for output: this engine takes {self._max_model_len}")
        return OverLimit(
            f"{what} needs {self.of(request, hold)} KV blocks of {unclaimed} free ones that nobody counts on "
            f"and a place among {running_max} running ones ({running} taken): wait for others to end"
        )

    def _blocks(self, known: int, tokens_max: int, hold: bool) -> int:
        """The last token of all is drawn but never computed."""
        tokens = known if hold else self.prediction.tokens(known, max(known, tokens_max - 1))
        return -(-tokens // self._block_tokens)


def check_request(request: GenerationRequest, vocab_size: int) -> None:
    """Raises ValueError for what no correct caller passes."""
    name = request.request_id
    if not request.prompt_ids:
        raise ValueError(f"request {name} has no prompt tokens")
    if len(request.output_ids) >= request.sampling.max_tokens:
        raise ValueError(f"request {name} already has its {request.sampling.max_tokens} output tokens")
    highest = max(*request.prompt_ids, *request.output_ids, 0)
    lowest = min(*request.prompt_ids, *request.output_ids, 0)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"request {name} has token ids outside 0..{vocab_size - 1}")


def check_onboarded(
    request: GenerationRequest, lent: int, blocks: int, tail: TailKV | None, block_tokens: int
) -> None:
    """Raises ValueError for KV of more tokens than the request has, or where it would be written over."""
    name, known = request.request_id, len(request.prompt_ids) + len(request.output_ids)
    if lent * block_tokens >= known:
        raise ValueError(f"request {name} of {known} tokens would write into the last block lent to it")
    onboarded = (lent + blocks) * block_tokens + (tail.tokens if tail else 0)
    if onboarded > known or (tail and not 0 < tail.tokens < block_tokens):
        raise ValueError(f"request {name} has {known} tokens, KV of {onboarded} was given")


def fitting_model_len(wanted: int | None, made_for: int, n_slots: int, block_tokens: int) -> int:
    """The longest sequence the model and the pool allow. Raises ConfigError."""
    if n_slots < 1:
        raise ConfigError("the KV pool holds not one block: raise pool_nbytes")
    held = n_slots * block_tokens
    if wanted is None:
        return min(made_for, held)
    if wanted > made_for:
        raise ConfigError(f"max_model_len is {wanted}, but the model was made for {made_for}: lower it")
    if held < wanted:
        log.warning("the KV pool is smaller than max_model_len", tokens=held, wanted=wanted)
    return min(wanted, held)
