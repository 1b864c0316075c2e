"""What a session answers its callers with: plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.nouns import (
    BlockKey,
    Epoch,
    LeaseId,
    MissReason,
    PinnedBlock,
    Quality,
    Refusal,
    ShardId,
)

Leases = tuple[tuple[ShardId, LeaseId], ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The prefix run all shards together serve, pinned under `leases`. `miss`: why it ended, if it did."""

    blocks: Sequence[PinnedBlock]
    leases: Leases
    miss: MissReason | None


class VerifiedBlock(NamedTuple):
    """Header, identity and checksum hold on the reader's own copy. `payload` is a view into it."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks
    payload: memoryview
    epoch: Epoch
    quality: Quality


@dataclass(frozen=True, slots=True)
class BlockMiss:
    index: int
    key: BlockKey
    reason: MissReason


@dataclass(frozen=True, slots=True)
class PublishBlock:
    """A block to publish. `payload` is uint8 of the layout's `block_nbytes` and must not change meanwhile."""

    key: BlockKey
    parent: BlockKey
    chain_index: int
    placement: BlockKey
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Published:
    """`blocks[i]` answers block i. With `pin_for_s` the references are pinned under `leases`."""

    blocks: tuple[PinnedBlock | Refusal, ...]
    leases: Leases
