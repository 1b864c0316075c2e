"""What ranks that read their own namespaces agree on: the shortest match, and the worst lineage.

A block of the model is one block a rank, each committed and evicted by itself. Of a prefix only what every
rank has is there; what some have beyond it is not used, and weighs nothing. Each rank's read is verified by
itself before it comes here.

    rank 0   [e7 lossless][e7 lossless][e7 int8]
    rank 1   [e7 int8]    [e7 lossless]              ->  two blocks, to be published at (7, int8)
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.onboard import Onboarded
from kvstore.lineage import Lineage

__all__ = ["agreed"]


def agreed(ranks: Sequence[Onboarded], lineage: Lineage) -> Onboarded:
    """One run for the engine: its payloads are all ranks' (pool.py), an origin is the worst of its ranks'.
    `lineage` is the sequence's before any of it. Where ranks differ in length, `miss` is the shortest's."""
    shortest = min(ranks, key=lambda rank: len(rank.payloads))
    whole = Onboarded(lineage, miss=shortest.miss)
    for index in range(len(shortest.payloads)):
        origins = [rank.origins[index] for rank in ranks]
        for epoch, quality in origins:
            whole.lineage = whole.lineage.absorb(epoch, quality)
            whole.epochs.add(epoch.number)
        oldest = min((epoch for epoch, _ in origins), key=lambda epoch: epoch.number)
        whole.origins.append((oldest, min(quality for _, quality in origins)))
        whole.payloads.append(memoryview(b"".join(rank.payloads[index] for rank in ranks)))
    return whole
