"""What a shard's core is told at start, and the plain values it answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.nouns import (
    KEYS_MAX,
    OFFERS_MAX,
    BlockKey,
    Incarnation,
    KVLayout,
    LeaseId,
    MissReason,
    Refusal,
    ShardId,
)


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """Every bound of one shard. Beyond one, the caller gets OverLimit or an explicit refusal."""

    slots_max: int = 65_536
    leases_max: int = 16_384
    txns_max: int = 1_024
    keys_max: int = KEYS_MAX  # of one match
    offers_max: int = OFFERS_MAX  # of one transaction
    namespaces_max: int = 4_096
    models_max: int = 1_024  # with epochs on this shard
    epochs_max: int = 65_536  # registered, of one model
    lease_s_max: float = 600.0
    pause_s: float = 2.0  # a longer silence of the clock is the shard's own pause
    answers_max: int = 1_024  # commits remembered, so that a retried one is answered again
    changes_max: int = 65_536  # remembered for watchers
    page_max: int = 1_024  # versions of one page of a listing


@dataclass(frozen=True, slots=True)
class CoreConfig:
    shard: ShardId
    incarnation: Incarnation
    capacity_nbytes: int
    limits: CoreLimits = CoreLimits()
    quotas: Mapping[str, int] = field(default_factory=dict)  # bytes a tenant may hold; others: all there are
    id_secret: bytes = field(default=b"", repr=False)  # makes lease and transaction ids nobody can guess


@dataclass(frozen=True, slots=True)
class Namespace:
    model_id: str
    layout: KVLayout
    tenant: str = "default"


@dataclass(frozen=True, slots=True)
class Offer:
    """One block a writer offers; `nbytes` is the whole frame's."""

    key: BlockKey
    parent: BlockKey
    chain_index: int
    placement: BlockKey
    nbytes: int


@dataclass(frozen=True, slots=True)
class Matched:
    """Columns over the run: entry i speaks of the i-th key."""

    slots: Sequence[int]
    generations: Sequence[int]
    epoch_ids: Sequence[int]  # of the core's epoch table
    qualities: Sequence[int]
    tiers: Sequence[int]
    nbytes: Sequence[int]
    lease: LeaseId | None
    miss: MissReason | None


@dataclass(frozen=True, slots=True)
class Committed:
    """Columns over the offers: where each landed (`slots[i]` is negative for one in `refused`).

    Answers are remembered for a while, hence arrays."""

    revision: int
    slots: Sequence[int]
    generations: Sequence[int]
    refused: Mapping[int, Refusal]
    lease: LeaseId | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes by state, and what an independent walk could not find an owner for."""

    live_nbytes: int
    staged_nbytes: int
    retired_nbytes: int
    ownerless_nbytes: int
