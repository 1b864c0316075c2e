"""What goes into an engine and what comes out: plain values, shared by prefill, decode and router."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.nouns import (
    Epoch,
    KVLayout,
    LeaseId,
    NamespaceId,
    PinnedBlock,
    Quality,
    ShardId,
    WeightsDigest,
)


class FinishReason(enum.Enum):
    """Why a sequence ended; the value is OpenAI's `finish_reason` where there is one."""

    STOP = "stop"  # eos, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client went away or asked
    ERROR = "error"


class UpdateMode(enum.Enum):
    """What becomes of the sequences that run when the weights under them change."""

    DRAIN = "drain"  # they end first, with the old weights; what is new waits
    ABORT = "abort"  # they end at once, and say why
    KEEP = "keep"  # they go on over the KV they have: nothing of it is published or kept from then on
    RECOMPUTE = "recompute"  # their tokens are computed anew under the new weights, then they go on


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. `temperature` 0 is greedy. Noise is a function of (seed, position)
    alone, so a sequence goes on identically wherever it goes on. What each parameter does to the logits, and
    in which order: engine/sampling/adjust.py and sampler.py."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    min_tokens: int = 0  # no end token is drawn, and no stop string ends anything, before so many
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output, as the next
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added)
    logprobs: int | None = None  # None: none; else of the token drawn and of so many of the highest


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model itself, before any sampling parameter: of the token
    that was drawn, and of the most probable ones, best first (of equals the lowest id first)."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One attempt at one request. `output_ids` are tokens that were already generated (and streamed)."""

    request_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    tenant: str = "default"
    priority: int = 0  # lower goes first, and leaves last when room is short
    deadline_s: float | None = None  # from its arrival at a worker to its turn there; None: it waits


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. `index` counts output tokens from 0 over all attempts."""

    request_id: str
    attempt: int
    index: int
    token_id: int
    finish: FinishReason | None = None
    error: str | None = None  # what happened, when finish is ERROR or ABORT (token_id is then -1)
    logprobs: TokenLogprobs | None = None
    epochs: tuple[int, ...] = ()  # of the weights that drew it and of the KV it attended to; told by roles


@dataclass(frozen=True, slots=True)
class CompletedBlock:
    """A block that became full in a step, copied out of the pool in the frame's layout:
    uint8 of `KVLayout.block_nbytes`, `[layer][k,v][token][kv_head][head_dim]`."""

    request_id: str
    attempt: int
    chain_index: int
    payload: npt.NDArray[np.uint8]
    slot: int = -1  # of the pool, where it lies


@dataclass(frozen=True, slots=True)
class TailKV:
    """KV of the tokens after the last full block: uint8, `[layer][k,v][token][kv_head][head_dim]`."""

    tokens: int
    payload: npt.NDArray[np.uint8]
    checksum: int  # xxh3_64 of the payload


class Shortage(NamedTuple):
    """Of a step that finds fewer slots than it wants. `first`: (priority, arrival) of the first in order who
    would find none; None: some compute less than they could, and nobody leaves."""

    slots: int
    first: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step of the engine produced, over all its sequences. A sequence whose drafts were accepted has
    several events, one after another; its blocks hold none but tokens told by events before its last one. Who
    was `preempted` has left the engine for want of room: the request, with all its tokens so far as output,
    to be admitted again."""

    events: tuple[TokenEvent, ...] = ()
    blocks: tuple[CompletedBlock, ...] = ()
    tokens_computed: int = 0  # rejected drafts aside
    preempted: tuple[GenerationRequest, ...] = ()
    drafts_proposed: int = 0
    drafts_accepted: int = 0


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """Where a prompt's KV came from."""

    prompt_tokens: int
    cached_tokens: int
    cached_by_tier: dict[str, int] = field(default_factory=dict)  # tier name -> tokens
    misses: dict[str, int] = field(default_factory=dict)  # MissReason value -> blocks
    epochs: tuple[int, ...] = ()  # epoch numbers of everything the sequence attended to


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What prefill answers as soon as it can: the router streams it at once."""

    event: TokenEvent
    stats: PrefillStats
    epoch: Epoch | None = None  # of the weights that drew it


@dataclass(frozen=True, slots=True)
class Handoff:
    """All that decode needs to go on where prefill stopped. One owner at a time: whoever holds it must
    release `leases` (or let them expire). `blocks` are the chain's first blocks without a gap; tokens
    they and `tail` do not cover are recomputed."""

    request: GenerationRequest  # output_ids includes the first token
    namespace: NamespaceId
    epoch: Epoch
    floor: Quality
    foreign: bool  # attended to KV of another epoch: decode publishes nothing
    blocks: tuple[PinnedBlock, ...]
    leases: tuple[tuple[ShardId, LeaseId], ...]
    tail: TailKV | None  # None unless `blocks` cover every full block of the prompt
    next_position: int  # of the token to be computed next: the sampler's counter


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who a worker is, once its model is loaded: the router pairs workers of equal weights and layouts."""

    worker_id: str
    model_id: str
    weights_digest: WeightsDigest
    layout: KVLayout
    max_model_len: int
    pid: int
    node_id: str  # of the cluster's node it runs on; empty outside a cluster
    edge_address: str = ""  # where other workers read its pool; empty: nowhere
    epoch_number: int = 0  # of the weights loaded now
    ranks: int = 1  # `layout` is the first one's; the others' have as many heads

    @property
    def token_nbytes(self) -> int:
        """Of KV outside the engine, all ranks' together."""
        return self.ranks * self.layout.token_nbytes


@dataclass(frozen=True, slots=True)
class PollResult:
    """Tokens of all of a decode worker's sequences since a cursor, in the order they were generated.

    `cursor` is what the next poll passes. The log behind it is bounded: a poller that fell too far behind
    sees a gap in some request's `index`, and resumes that request from the tokens it has. `preempted` are
    the requests and attempts that lost their room and have had no token since: it is late, not lost."""

    cursor: int
    events: tuple[TokenEvent, ...]
    preempted: tuple[tuple[str, int], ...] = ()
