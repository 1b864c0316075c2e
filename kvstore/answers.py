"""What a session answers its callers with: plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.lineage import Lineage
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
from kvstore.tensors import KVArray

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


class Put(NamedTuple):
    """`n_tokens`: how many tokens of the sequence, from its first on, readers find now. `refused`: blocks
    that were not taken, by reason (a block that was there already is no refusal)."""

    n_tokens: int
    refused: dict[Refusal, int]


class Hit(NamedTuple):
    """`kv`: `[layer][k,v][token][kv_head][head_dim]` of the tokens that were asked for, up to `n_tokens`.

    `misses`: whole blocks of the sequence that were not served, by reason. `lineage`: what `kv` was computed
    from; give it to `put` as `over` for what is computed over it.
    """

    n_tokens: int
    kv: KVArray
    misses: dict[MissReason, int]
    lineage: Lineage


def put_of(answers: Sequence[PinnedBlock | Refusal], start: int, block_tokens: int) -> Put:
    """What a put says whose blocks, from the token `start` on, were answered so."""
    run = next((i for i, answer in enumerate(answers) if isinstance(answer, Refusal)), len(answers))
    refused: dict[Refusal, int] = {}
    for answer in answers:
        if isinstance(answer, Refusal):
            refused[answer] = refused.get(answer, 0) + 1
    return Put(start + run * block_tokens, refused)
