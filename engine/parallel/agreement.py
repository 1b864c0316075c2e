"""What ranks that read and write namespaces of their own agree on: the shortest run, the worst origin.

A block of the model is one block a rank, each committed and evicted by itself. Of a prefix only what every
rank has is there; what some have beyond it is not used, and weighs nothing. A block claims no more than the
worst of its parts, which its sequence's lineage then absorbs (kvstore/lineage.py).

    rank 0   [e7 lossless][e7 lossless][e7 int8]
    rank 1   [e7 int8]    [e7 lossless]              ->  [e7 int8][e7 lossless]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.answers import BlockMiss, Match, Published, VerifiedBlock
from kvstore.nouns import BlockKey, PinnedBlock, Refusal

__all__ = ["RankedBlock", "RankedKey", "joined_block", "shares", "shortest_match", "whole_publication"]


class RankedKey(bytes):
    """Rank 0's key of a block, and with it the `others`', in the order of ranks."""

    others: tuple[BlockKey, ...]

    @classmethod
    def of(cls, keys: Sequence[BlockKey]) -> RankedKey:
        key = cls(keys[0])
        key.others = tuple(keys[1:])
        return key


class RankedBlock(PinnedBlock):
    """Rank 0's block where it is pinned, and with it the `others`'. Travels in a handoff as it is."""

    others: tuple[PinnedBlock, ...]

    @classmethod
    def of(cls, blocks: Sequence[PinnedBlock]) -> RankedBlock:
        block = cls(*blocks[0])
        block.others = tuple(blocks[1:])
        return block


def shortest_match(ranks: Sequence[Match]) -> Match:
    """The run that all of them have. What is pinned beyond it goes with the leases."""
    shortest = min(ranks, key=lambda match: len(match.blocks))
    blocks = [RankedBlock.of(parts) for parts in zip(*(match.blocks for match in ranks), strict=False)]
    return Match(blocks, tuple(lease for match in ranks for lease in match.leases), shortest.miss)


def joined_block(parts: Sequence[VerifiedBlock | BlockMiss]) -> VerifiedBlock | BlockMiss:
    """One block of all ranks' parts, in the order of ranks; a miss where one part is. Epochs differ only
    where a session takes older ones: then the oldest is the block's."""
    verified: list[VerifiedBlock] = []
    for part in parts:
        if isinstance(part, BlockMiss):
            return part
        verified.append(part)
    payload = memoryview(b"".join(part.payload for part in verified))
    oldest = min((part.epoch for part in verified), key=lambda epoch: epoch.number)
    return VerifiedBlock(verified[0].index, payload, oldest, min(part.quality for part in verified))


def whole_publication(ranks: Sequence[Published]) -> Published:
    """A block is there when all its parts are; else why the first of them is not."""
    blocks: list[PinnedBlock | Refusal] = []
    for parts in zip(*(published.blocks for published in ranks), strict=True):
        refused = [part for part in parts if isinstance(part, Refusal)]
        pinned = [part for part in parts if isinstance(part, PinnedBlock)]
        blocks.append(refused[0] if refused else RankedBlock.of(pinned))
    return Published(tuple(blocks), tuple(lease for published in ranks for lease in published.leases))


def shares(payload: memoryview | npt.NDArray[np.uint8], ranks: int) -> list[memoryview]:
    """What of a payload is each rank's: views. Ranks have equally many heads."""
    whole = np.frombuffer(payload, np.uint8).data
    size = len(whole) // ranks
    return [whole[rank * size : (rank + 1) * size] for rank in range(ranks)]
