"""What the scheduler's half of the connector tells the workers' halves once a step, and what they answer.

vLLM carries both between its processes. Plain values, none of vLLM's: what a plan costs grows with what
changes in a step, not with how many requests run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.answers import Leases
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
    leases: tuple[Leases, ...]  # of each rank: to be given back by the scheduler's half, renewed by it, too
    block_ids: tuple[int, ...]


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
    salt: str = ""  # vLLM's cache_salt: into the first block's extra digest
    adapter: str = ""  # hex digest of the adapter's files; empty: none


@dataclass(slots=True)
class StepPlan:
    """One step's. `ended`: requests that finished or were preempted; their chains are forgotten."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.loads or self.saves or self.ended)


@dataclass(slots=True)
class StepReport:
    """A worker's answer, of what ended since the last one."""

    loaded: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)  # vLLM's ids
    counters: dict[str, int] = field(default_factory=dict)  # differences
