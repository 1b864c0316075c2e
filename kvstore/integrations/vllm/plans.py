"""What the scheduler's half of the connector tells the workers' halves once a step, and what they answer.

vLLM carries both between its processes. Plain values, none of vLLM's: what a plan costs grows with what
changes in a step, not with how many requests run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.nouns import Epoch, PinnedBlock

__all__ = ["Load", "Save", "StepPlan", "StepReport"]


@dataclass(frozen=True, slots=True)
class Load:
    """Fill tokens `begin .. end` of a request's blocks, which nobody reads until it is reported as loaded.

    `runs` has of each rank the pinned blocks of ours, the first of which holds token `begin` (tokens before
    it that this block holds, too, are there already). `block_ids` are the request's vLLM blocks from its
    first token on; `begin` and `end` are multiples of vLLM's block size.
    """

    request_id: str
    epoch: Epoch
    begin: int
    end: int
    runs: tuple[tuple[PinnedBlock, ...], ...]
    block_ids: tuple[int, ...]
    adapter: str = ""  # hex digest of the adapter's files; empty: none


@dataclass(frozen=True, slots=True)
class Save:
    """The forward pass of this step completes blocks of ours: tokens `begin .. end`, multiples of their size.

    `token_ids` are those tokens; `begin` is where the last save of this request ended, and 0 where it has
    none: a worker extends the request's key chain by them. Blocks before `wanted` are in the store already:
    only their keys are needed. `block_ids` are the vLLM blocks that hold tokens from `wanted` on.
    """

    request_id: str
    epoch: Epoch
    begin: int
    wanted: int
    end: int
    token_ids: bytes  # u32, little-endian
    block_ids: tuple[int, ...]
    salt: str = ""  # vLLM's cache_salt: into the first block's extra digest (keys.py)
    adapter: str = ""  # hex digest of the adapter's files; empty: none
    pin_for_s: float | None = None  # of a handoff: what is published stays at least so long


@dataclass(slots=True)
class StepPlan:
    """One step's. `ended`, before anything else of the plan: requests that finished or were preempted, whose
    chains are forgotten. A load of theirs that is under way is reported all the same."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    is_idle: bool = False  # nothing is computed in this step

    def __bool__(self) -> bool:
        return bool(self.loads or self.saves or self.ended)


@dataclass(slots=True)
class StepReport:
    """A worker's answer, of what ended since the last one."""

    loaded: set[str] = field(default_factory=set)  # every load once, also a failed one
    failed_blocks: set[int] = field(default_factory=set)  # vLLM's ids
    counters: dict[str, int] = field(default_factory=dict)  # differences
    seconds: dict[str, list[float]] = field(default_factory=dict)  # how long each took: "load", "publish"
    stored: list[tuple[str, int, int]] = field(default_factory=list)  # request, begin, end: in the store now
