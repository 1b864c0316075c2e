"""The transport seam: one shard, seen by a client. Local, gRPC and (in tests) simulated peers obey it.

`driver.ShardDriver` implements this protocol in process; `transport/grpc/` carries it over a network;
`client.StoreClient` speaks to N of them and adds placement, verification and miss accounting. Every
method that may wait takes `timeout_s` and answers or raises within it. Errors are `errors.py`'s;
a block that is not served is a `MissReason` or `Refusal` in the answer, never an exception.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Final, Protocol

from kvstore.core.retention import Retention
from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    BlockRef,
    Change,
    Epoch,
    EpochPolicy,
    EpochsOfModel,
    Incarnation,
    KnownNamespace,
    LeaseId,
    Listed,
    MissReason,
    NamespaceId,
    NamespaceSpec,
    PinnedBlock,
    Quality,
    Refusal,
    Revision,
    ShardId,
    Snapshot,
    Tier,
    TxnId,
)

WIRE_VERSION: Final = 1
WIRE_VERSIONS_READ: Final = frozenset({1})  # our own and, once there is one, the one before
REQUEST_ID_NBYTES: Final = 16  # random, made by the client: what makes a begin repeatable
QUALITIES: Final = {int(quality): quality for quality in Quality}
TIERS: Final = {int(tier): tier for tier in Tier}
_REF: Final = partial(tuple.__new__, BlockRef)  # what its _make does, without a frame for each
_PINNED: Final = partial(tuple.__new__, PinnedBlock)
CHUNK_NBYTES: Final = (2 << 20) + (64 << 10)
"""Of a message of a bulk stream, at most. Blocks are often powers of two: their headers have room beside."""


@dataclass(frozen=True, slots=True)
class ShardHello:
    shard: ShardId
    incarnation: Incarnation
    wire_version: int
    disk_version: int
    shm_socket: str = ""  # where clients of the shard's own host get at its memory; "": nowhere


@dataclass(frozen=True, slots=True)
class MatchResult:
    """The longest prefix run of the keys asked for that this shard serves, pinned under `lease`.

    Columns: entry i speaks of the i-th key. A run has one epoch unless stale KV was asked for.
    """

    slots: Sequence[int]
    generations: Sequence[int]
    epochs: tuple[Epoch, ...]  # the distinct ones of the run
    epoch_indexes: Sequence[int]  # into `epochs`; empty when there is only one
    qualities: Sequence[int]
    tiers: Sequence[int]
    nbytes: Sequence[int]  # of the whole frames
    lease: LeaseId | None  # None when there is nothing to pin
    miss: MissReason | None  # why the run ended; None when every key was matched
    revision: Revision

    def __len__(self) -> int:
        return len(self.slots)

    def pinned(self, shard: ShardId, keys: Sequence[BlockKey]) -> list[PinnedBlock]:
        """The run as values, `keys` being what was asked for.

        Hot, hence no line of it runs once a block (benchmarks/latency.py).
        """
        if not self.slots:
            return []
        where = repeat(shard), repeat(self.revision.incarnation), self.slots, self.generations
        columns = (
            keys,
            map(_REF, zip(*where, strict=False)),
            map(self.epochs.__getitem__, self.epoch_indexes or repeat(0, len(self))),
            map(QUALITIES.__getitem__, self.qualities),
            map(TIERS.__getitem__, self.tiers),
        )
        return list(map(_PINNED, zip(*columns, strict=False)))


@dataclass(frozen=True, slots=True)
class Announced:
    """The run that a match would find now, and what of it is on its way to the host."""

    tiers: Sequence[int]  # entry i speaks of the i-th key
    coming: int  # blocks
    coming_nbytes: int
    promotion_nbytes_s: float  # as measured lately on this shard; 0: not yet


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Changes in revision order, whole revisions only: nothing at or before `revision` is still to come."""

    revision: Revision
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class ListPage:
    revision: Revision
    versions: tuple[Listed, ...]
    next_cursor: int  # 0 when this was the last page


@dataclass(frozen=True, slots=True)
class Purge:
    """What to delete for good: of a namespace everything, only these keys, or only one epoch."""

    namespace: NamespaceId
    keys: tuple[BlockKey, ...] | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Purged:
    """`versions` and `nbytes` were freed; what is pinned follows with its pins."""

    revision: Revision
    versions: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadItem:
    """The answer for the `index`-th ref of a read: a frame's bytes, owned by the reader, or a reason."""

    index: int
    frame: memoryview | None
    miss: MissReason | None


@dataclass(frozen=True, slots=True)
class BlockOffer:
    """What a writer offers to a transaction before it sends any byte."""

    key: BlockKey
    parent: BlockKey
    chain_index: int
    placement: BlockKey
    nbytes: int  # of the whole frame
    retention: Retention | None = None  # None: nothing is said of it


@dataclass(frozen=True, slots=True)
class TxnOpened:
    """`outcomes[i]` answers offer i: None is granted (send the frame), else why it was refused."""

    txn: TxnId
    outcomes: tuple[Refusal | None, ...]


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`blocks[i]` answers offer i of the begin: where the block is readable now, or why it is not.

    A block refused as EXISTS at begin is answered with the reference of the version that exists. With
    `pin_for_s` every reference is pinned under `lease`.
    """

    revision: Revision
    blocks: tuple[BlockRef | Refusal, ...]
    lease: LeaseId | None


@dataclass(frozen=True, slots=True)
class ShardStatus:
    shard: ShardId
    incarnation: Incarnation
    revision: int
    capacity_nbytes: int
    live_nbytes: int
    staged_nbytes: int
    retired_nbytes: int  # no longer visible, still pinned
    ownerless_nbytes: int  # found by the independent walk; anything but 0 is a bug
    versions: int
    leases: int
    oldest_pin_s: float
    nvme_nbytes: int = 0
    nvme_capacity_nbytes: int = 0
    counters: dict[str, int] = field(default_factory=dict)  # "miss:absent", "refusal:staged", ...


class ShardTransport(Protocol):
    """One shard. All methods may raise Unavailable, DeadlineExceeded, Unauthenticated or OverLimit."""

    @property
    def shard(self) -> ShardId: ...

    async def hello(self, *, timeout_s: float) -> ShardHello:
        """Agree on a wire version. Raises WireVersionMismatch."""
        ...

    async def open_namespace(self, spec: NamespaceSpec, tenant: str, *, timeout_s: float) -> NamespaceId:
        """The namespace's id for the tenant. Idempotent; needed on every shard and incarnation before use."""
        ...

    async def register_epoch(self, model_id: str, epoch: Epoch, *, timeout_s: float) -> None:
        """Bind an epoch number to weights. Idempotent; raises EpochConflict when bound to others."""
        ...

    async def advance_epoch(
        self, model_id: str, number: int, policy: EpochPolicy = ISOLATE, *, timeout_s: float
    ) -> Revision:
        """Make a registered epoch the model's current one. O(1): older versions become first victims.

        Idempotent: the current number may be given again to change the policy; an older one changes nothing.
        """
        ...

    async def epochs(self, model_id: str, *, timeout_s: float) -> EpochsOfModel: ...

    async def namespaces(self, *, timeout_s: float) -> tuple[KnownNamespace, ...]:
        """Those that are open here, of all tenants."""
        ...

    async def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult: ...

    async def announce(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], wait_s: float, *, timeout_s: float
    ) -> Announced:
        """A reader will soon ask for these: what lies below the host is to come up, first blocks first.

        Pins nothing. Waits until nothing of it is on its way any more, or `wait_s` are over (`timeout_s` less
        the answer's own way at most): that is no error.
        """
        ...

    def read(
        self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> AsyncIterator[ReadItem]:
        """Frames in the order of `refs`, one ReadItem each, unless the stream breaks (raises).

        A reference into another namespace is a stale reference.
        """
        ...

    async def renew(self, leases: Sequence[LeaseId], lease_s: float, *, timeout_s: float) -> list[bool]:
        """Extend leases; False for one that is gone."""
        ...

    async def release(self, leases: Sequence[LeaseId], *, timeout_s: float) -> None:
        """Drop leases. Idempotent: one that is gone is no error."""
        ...

    async def begin(
        self,
        namespace: NamespaceId,
        epoch: Epoch,
        quality: Quality,
        offers: Sequence[BlockOffer],
        owner: str,
        lease_s: float,
        request_id: bytes,
        *,
        timeout_s: float,
    ) -> TxnOpened:
        """Reserve slots. Retrying with the same `request_id` answers the same transaction."""
        ...

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], *, timeout_s: float
    ) -> list[Refusal | None]:
        """Send (offer index, header, payload) for granted offers; the shard verifies each on arrival."""
        ...

    async def commit(self, txn: TxnId, pin_for_s: float | None, *, timeout_s: float) -> CommitResult:
        """Make what was written visible, at one revision. What was not written is refused by name."""
        ...

    async def abort(self, txn: TxnId, *, timeout_s: float) -> None:
        """Free what the transaction staged. Idempotent."""
        ...

    async def report(self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float) -> int:
        """A reader found these corrupt. The shard verifies its own copy and retires what fails; how many."""
        ...

    async def listing(
        self, namespace: NamespaceId, at: Revision | None, cursor: int, limit: int, *, timeout_s: float
    ) -> ListPage:
        """One page of what is visible at a revision (None: latest; ask the next pages at the answer's).

        Raises Compacted for a revision of another incarnation or below the horizon.
        """
        ...

    def watch(
        self, namespaces: Sequence[NamespaceId], after: Revision | None, *, timeout_s: float
    ) -> AsyncIterator[WatchBatch]:
        """Changes after a revision (None: from now on), in order and without gaps, for `timeout_s`.

        Ends by itself then: watch again from the last revision seen. Raises Compacted when that is below
        the horizon or of another incarnation: list, and watch from the listing's revision.
        """
        ...

    async def purge(self, scope: Purge, *, timeout_s: float) -> Purged:
        """Delete for good: gone from every later answer, on no later day to return. Idempotent."""
        ...

    async def compact(self, revision: Revision, *, timeout_s: float) -> Revision:
        """Forget what only snapshots and watches below `revision` need; the horizon from here on.

        Raises Compacted for another incarnation's revision, ConfigError for one that is still to come.
        """
        ...

    async def status(self, *, timeout_s: float) -> ShardStatus: ...

    async def close(self) -> None: ...
