"""What a shard's core is told at start, and the plain values it answers with."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.core.retention import Retention
from kvstore.nouns import (
    KEYS_MAX,
    OFFERS_MAX,
    BlockKey,
    Incarnation,
    KVLayout,
    LeaseId,
    MissReason,
    Quality,
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


class Encoding(NamedTuple):
    """What a tier's codec makes of a lossless block."""

    quality: Quality
    nbytes: int  # of the whole frame


class DemoteWhen(enum.Enum):
    """When a version becomes a candidate for the tier below."""

    COMMITTED = "write_through"  # as soon as its writer has let go of it
    USED_AGAIN = "write_through_selective"  # whenever it is let go of, if the admission policy admits it
    CROWDED = "write_back"  # when it is next to go and the host is nearly full


@dataclass(frozen=True, slots=True)
class Tiering:
    """The tiers below the host, and what moves to them. Nothing does where `nvme_nbytes` is 0."""

    nvme_nbytes: int = 0
    when: DemoteWhen = DemoteWhen.USED_AGAIN
    exclusive: bool = False  # a version leaves the tier it was copied from
    encode: Callable[[KVLayout], Encoding | None] | None = None  # None: bytes go down as they are
    watermarks: tuple[float, float] = (0.9, 0.8)  # of the host: write_back begins above, goes on to below
    queue_nbytes_max: int | None = (
        None  # of candidates in either direction, names all of them; None: the host
    )


@dataclass(frozen=True, slots=True)
class Foresight:
    """What is about to be asked for. Nothing is predicted while `share` is 0."""

    share: float = 0.05  # of the host, at most, for what was predicted and is not used yet
    within_s: float = 120.0  # how soon it must likely be used; what is not by then was wasted
    probability_min: float = 0.5
    waste_max: float = 0.5  # of the bytes brought up; above, none are until that is long past
    keeps_s: float = 30.0  # what was announced is given up last for so long, or until it is asked for
    keeps_share: float = 0.5  # of the host, at most, for all that is to be asked for
    forgets_s: float = 300.0  # half of what was wasted or well spent so long ago does not count any more


@dataclass(frozen=True, slots=True)
class CoreConfig:
    shard: ShardId
    incarnation: Incarnation
    capacity_nbytes: int
    limits: CoreLimits = CoreLimits()
    quotas: Mapping[str, int] = field(default_factory=dict)  # bytes a tenant may hold; others: all there are
    id_secret: bytes = field(default=b"", repr=False)  # makes lease and transaction ids nobody can guess
    tiering: Tiering = Tiering()
    foresight: Foresight = Foresight()


@dataclass(frozen=True, slots=True)
class Namespace:
    model_id: str
    layout: KVLayout
    tenant: str = "default"


@dataclass(frozen=True, slots=True)
class Offer:
    """One block a writer offers; `nbytes` is the whole frame's. `retention`: None says nothing, and leaves a
    block that is there already as it is."""

    key: BlockKey
    parent: BlockKey
    chain_index: int
    placement: BlockKey
    nbytes: int
    retention: Retention | None = None


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


class Announcement(NamedTuple):
    """The run that a match would find, unpinned, and what of it is on its way to the host."""

    places: Sequence[tuple[int, int]]  # slot and generation; entry i speaks of the i-th key
    tiers: Sequence[int]
    coming: Sequence[int]  # slots
    coming_nbytes: int


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
    """Bytes on the host by state, what an independent walk could not find an owner for, and bytes below."""

    live_nbytes: int
    staged_nbytes: int
    retired_nbytes: int
    ownerless_nbytes: int
    nvme_nbytes: int
