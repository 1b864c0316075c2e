"""What the scheduler's half remembers of one request, and the arithmetic of what to load and to save of it.

All of it in tokens from the sequence's first on:

    0            local        told               end of a hit            known
    |-- vLLM's own cache --|-- to load: whole vLLM blocks --|
    |-- kept: in the store, or on the way there ----------------|-- next save --|
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from kvstore.integrations.vllm.adapters import LoraRequest
from kvstore.integrations.vllm.lookups import Hit, Lookup

__all__ = ["Phase", "StepOutput", "Tracked", "VllmRequest", "loadable", "why_not"]


class VllmRequest(Protocol):
    """What is read of vLLM's own `Request`."""

    request_id: str
    all_token_ids: Any  # a list that grows; slices are lists
    num_prompt_tokens: int
    cache_salt: str | None
    lora_request: LoraRequest | None
    mm_features: Any  # a list that grows where input is streamed
    prompt_embeds: Any
    kv_transfer_params: dict[str, Any] | None
    skip_reading_prefix_cache: bool

    @property
    def num_computed_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


class StepOutput(Protocol):
    """What is read of vLLM's own `SchedulerOutput`."""

    @property
    def scheduled_new_reqs(self) -> Sequence[Any]: ...

    @property
    def scheduled_cached_reqs(self) -> Any: ...

    @property
    def num_scheduled_tokens(self) -> Mapping[str, int]: ...

    @property
    def preempted_req_ids(self) -> set[str] | None: ...


class Phase(Enum):
    """Of a request's way to its load."""

    NEW = "new"  # nothing was asked yet, or it was preempted
    ASKED = "asked"  # its look-up is under way, or has answered and is pinned
    LOADING = "loading"
    OVER = "over"  # loaded, or there is nothing to load


@dataclass(slots=True, eq=False)
class Tracked:
    request: VllmRequest
    generation: int  # of the weights it began under
    save_until: int  # tokens beyond are not saved; grows where what is generated is, too
    is_handoff: bool = False  # a decode instance will ask for it
    may_load: bool = True  # not after a load that failed
    phase: Phase = Phase.NEW
    lookup: Lookup | None = None
    hit: Hit | None = None  # of the look-up, as vLLM was told of it: a lease that is lost is told no more
    has_waited: bool = False  # for a prefill instance: once is enough
    give_up_at: float = 0.0  # when an unanswered look-up is a hit of nothing
    adapter: str | None = None  # its name, once it is known
    told: int = 0  # vLLM's own hit, when it was last told what to load
    load_end: int = 0
    block_ids: list[int] = field(default_factory=list)
    kept: int = 0  # tokens that need no save: found in the store, or saved
    chained: int = 0  # tokens whose keys the workers have: the end of the last save
    save_at: int = 0  # a step that computes so many tokens completes a block to save


def why_not(request: VllmRequest) -> str | None:
    """Why a request stays out of the store: tokens do not say what its KV is made of. Ask again: where input
    is streamed, an image may follow text."""
    if request.mm_features:
        return "multimodal"
    return "prompt_embeds" if request.prompt_embeds is not None else None


def loadable(hit_tokens: int, known_tokens: int, computed: int, vllm_block: int) -> int:
    """How many tokens behind `computed` to load: whole blocks of vLLM's.

    >>> loadable(hit_tokens=96, known_tokens=100, computed=16, vllm_block=16)
    80
    >>> loadable(hit_tokens=96, known_tokens=100, computed=0, vllm_block=128)
    0
    """
    end = min(hit_tokens, known_tokens) // vllm_block * vllm_block
    return max(0, end - computed)
