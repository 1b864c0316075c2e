"""Load or compute: how much of a run of stored blocks is worth fetching, and from where on to compute.

*The trade.* A reader that loads the first k blocks of a run and computes the rest of its prompt waits

    W(k) = load(the first k blocks) + prefill(from token k * block_tokens to the end)
    load = of each tier that has some of them: what a read costs at all + what each block costs

Both halves are what this reader measured lately, of each tier and of computing a token at a position. What
a computation costs at all is left out: its last token is computed in any case. W is looked at for every k,
O(blocks): computing gets dearer with the position (attention), loading does not, and a read has its fixed
cost, so a run's *first* blocks are the ones that may be cheaper to compute. They cannot be left out, since
what follows attends to them: all or a prefix is all there is to choose from.

*Doubt loads.* A tier that was never measured is loaded from: else it never would be measured. So is
everything while the cost of computing is not known. Measurements scatter: a run is only cut where that
saves more than MARGIN of the wait and more than SAVES_S_MIN, so what is on the host and clearly cheaper to
load always is loaded. Whoever asks loads one run in some that should be cut all the same (engine/gate.py):
a tier that got faster is found out.

CacheGen (Liu et al., SIGCOMM 2024) also decides, chunk by chunk, whether KV is sent or computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

MARGIN: Final = 0.2
SAVES_S_MIN: Final = 0.02


@dataclass(frozen=True, slots=True)
class LoadCost:
    """Seconds for n blocks of one tier in one read: `read_s + block_s * n`."""

    read_s: float
    block_s: float

    def seconds(self, blocks: int) -> float:
        return self.read_s + self.block_s * blocks if blocks else 0.0


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds for one token at position p: `token_s + position_s * p`. Zeros: not known."""

    token_s: float = 0.0
    position_s: float = 0.0

    def seconds(self, start: int, end: int) -> float:
        """For the tokens from `start` to `end`, in one go."""
        return self.token_s * (end - start) + self.position_s * (end * end - start * start) / 2


def worth_loading(
    tiers: Sequence[int],
    block_tokens: int,
    prompt_tokens: int,
    load: Mapping[int, LoadCost],
    prefill: PrefillCost,
    *,
    start: int = 0,
) -> int:
    """How many of the run's blocks to load, from its first on. `tiers[i]` is where block i lies; a
    tier that `load` lacks was not measured. The run begins at token `start`: what stands before it is here
    already."""
    if not tiers or prefill.token_s <= 0 or not load.keys() >= set(tiers):
        return len(tiers)
    wait_s = least_s = prefill.seconds(start, prompt_tokens)
    best, loading_s = 0, 0.0
    begun: set[int] = set()
    for k, tier in enumerate(tiers, 1):
        loading_s += load[tier].block_s + (load[tier].read_s if tier not in begun else 0.0)
        begun.add(tier)
        wait_s = loading_s + prefill.seconds(min(start + k * block_tokens, prompt_tokens), prompt_tokens)
        if wait_s <= least_s:
            best, least_s = k, wait_s
    return best if wait_s - least_s > max(MARGIN * wait_s, SAVES_S_MIN) else len(tiers)
