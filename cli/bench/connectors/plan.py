"""What a run measures, and what is promised of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["PROMISES", "QUICK", "STEP_TOKENS_MAX", "TAIL_TOKENS", "Case", "Plan", "Promise", "nvme_case"]

TAIL_TOKENS: Final = 16
"""Behind the tokens that can be hit: a hit computes these, as a new question about a known text does."""
STEP_TOKENS_MAX: Final = 2048  # what vLLM's server takes in one step unless told otherwise
START_S: Final = 900.0
CALL_S: Final = 300.0
SETTLE_S: Final = 60.0  # for what was saved to be visible, or on the disk

Case = str
COLD: Final = "vllm_cold"
OWN_CACHE: Final = "vllm_own_cache"
COLD_SAVING: Final = "kvstrata_cold_saving"
COLD_LOOKING: Final = "kvstrata_cold_looking"
SHM: Final = "kvstrata_shm"
GRPC: Final = "kvstrata_grpc"
EXAMPLE_COLD: Final = "example_cold_saving"
EXAMPLE: Final = "example_tmpfs"


def nvme_case(codec: str) -> Case:
    return f"kvstrata_nvme_{codec}"


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int = 5  # and one before them that warms up and is thrown away
    lengths: tuple[int, ...] = (512, 2048, 4096)  # multiples of vLLM's block of 128 tokens
    codecs: tuple[str, ...] = ()  # what NVMe tiers encode with, one after the other

    @property
    def context_max(self) -> int:
        return max(self.lengths) + TAIL_TOKENS + 1


QUICK: Final = Plan(rounds=1, lengths=(128, 256))
"""Proves that everything runs; its figures mean nothing."""


class Promise(NamedTuple):
    """Of pairs taken one right after the other: TTFT of `case` over that of `beside`, or what it saves."""

    name: str
    case: Case
    beside: Case
    bound: float
    faster: bool  # the bound is a least `beside / case`; else a greatest `case / beside`
    lengths: tuple[int, ...]  # that it is promised at; others are shown


PROMISES: Final = (
    Promise("saving, of cold", COLD_SAVING, COLD, 1.05, False, (512, 2048, 4096)),
    Promise("looking up in vain, of cold", COLD_LOOKING, COLD, 1.03, False, (512, 2048, 4096)),
    Promise("shared-memory hit, times faster than recomputing", SHM, COLD, 5.0, True, (2048,)),
)
