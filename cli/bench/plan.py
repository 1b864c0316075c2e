"""How much a run of the bench does: sizes, working sets, counts. One plan, full or quick.

The working set is far beyond any cache, and a request is a long prompt: what an engine asks for at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
SIZES: Final = (64 * KIB, 1 * MIB, 4 * MIB)  # bytes of one block's payload
TIMEOUT_S: Final = 120.0  # of any one call, so that nothing waits for ever


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int = 5  # and one before them that warms up and is thrown away
    working_nbytes: int = 256 * MIB  # of each size: read whole in every round
    request_nbytes: int = 64 * MIB  # moved by one match and one read; also what a round writes
    matches: int = 200  # of 64 keys, a round
    throughput_matches: int = 96  # of MATCH_KEYS_MANY keys, a round
    pairs: int = 10_000  # commits, each followed by a match from another client
    versions: int = 1_000_000  # resident in one core
    probes: int = 4_000  # timed matches before, and during, reclamation

    def request_blocks(self, nbytes: int) -> int:
        return max(1, self.request_nbytes // nbytes)

    def requests(self, nbytes: int) -> int:
        return max(1, self.working_nbytes // (self.request_blocks(nbytes) * nbytes))

    def blocks(self, nbytes: int) -> int:
        return self.requests(nbytes) * self.request_blocks(nbytes)


QUICK: Final = Plan(
    rounds=1,
    working_nbytes=8 * MIB,
    request_nbytes=4 * MIB,
    matches=10,
    throughput_matches=4,
    pairs=50,
    versions=8_192,
    probes=200,
)
"""Proves that everything runs; its figures mean nothing."""
