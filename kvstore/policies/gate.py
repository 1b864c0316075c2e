"""Load or compute: how much of a run of stored blocks is worth fetching, and from where on to compute.

*The trade.* A reader that loads the first k blocks of a run and computes the rest of its prompt waits

    W(k) = sum of nbytes[i] / rate[tier of i] for i < k  +  prefill(from token k * block_tokens to the end)

Both halves are what this reader measured lately: what each tier gave it a second, and what computing a
token at a position cost. W is looked at for every k, O(blocks): computing gets dearer with the position
(attention), loading does not, so a run's *first* blocks are the ones that may be cheaper to compute. They
cannot be left out, since what follows attends to them: all or a prefix is all there is to choose from.

*Doubt loads.* A tier that was never measured is loaded from: else it never would be measured. So is
everything while the cost of computing is not known. Measurements scatter: a run is only cut where that
saves more than MARGIN of the wait and more than SAVES_S_MIN, so what is on the host and clearly cheaper to
load always is loaded.
Whoever asks loads one run in some that should be cut all the same (engine/gate.py): a tier that got faster
is found out.

The comparison is DESIGN 4.9's; CacheGen (Liu et al., SIGCOMM 2024) chooses between loading and recomputing
chunk by chunk in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

MARGIN: Final = 0.2
SAVES_S_MIN: Final = 0.01


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
    block_nbytes: int,
    block_tokens: int,
    prompt_tokens: int,
    nbytes_s: Mapping[int, float],
    prefill: PrefillCost,
    *,
    start: int = 0,
) -> int:
    """How many of the run's blocks to load, from its first on. `tiers[i]` is where block i lies, `nbytes_s`
    what a tier gave a second; one that is missing or 0 was not measured. The run begins at token `start`:
    what stands before it is here already."""
    if not tiers or prefill.token_s <= 0 or not all(nbytes_s.get(tier, 0.0) > 0 for tier in set(tiers)):
        return len(tiers)
    wait_s = least_s = prefill.seconds(start, prompt_tokens)
    best, loading_s = 0, 0.0
    for k, tier in enumerate(tiers, 1):
        loading_s += block_nbytes / nbytes_s[tier]
        wait_s = loading_s + prefill.seconds(min(start + k * block_tokens, prompt_tokens), prompt_tokens)
        if wait_s <= least_s:
            best, least_s = k, wait_s
    return best if wait_s - least_s > max(MARGIN * wait_s, SAVES_S_MIN) else len(tiers)
