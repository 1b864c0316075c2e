"""The transport seam: one shard, seen by a client. Local, gRPC and (in tests) simulated peers obey it.

`driver.ShardDriver` implements this protocol in process; `transport/grpc/` carries it over a network;
`client.StoreClient` speaks to N of them and adds placement, verification and miss accounting. Every
method that may wait takes `timeout_s` and answers or raises within it. Errors are `errors.py`'s;
a block that is not served is a `MissReason` or `Refusal` in the answer, never an exception.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvstore.nouns import (
    BlockKey,
    BlockRef,
    Epoch,
    Incarnation,
    LeaseId,
    MissReason,
    NamespaceId,
    NamespaceSpec,
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
CHUNK_NBYTES: Final = 1 << 20  # bulk streams move frames in pieces of about this size


@dataclass(frozen=True, slots=True)
class ShardHello:
    shard: ShardId
    incarnation: Incarnation
    wire_version: int
    disk_version: int


@dataclass(frozen=True, slots=True)
class MatchHit:
    """One block of a match's run. Pinned until the match's lease is released or expires."""

    ref: BlockRef
    epoch: Epoch
    quality: Quality
    tier: Tier
    nbytes: int  # of the whole frame


@dataclass(frozen=True, slots=True)
class MatchResult:
    """The longest prefix run of the keys asked for that this shard serves, pinned under `lease`."""

    hits: tuple[MatchHit, ...]
    lease: LeaseId | None  # None when there is nothing to pin
    miss: MissReason | None  # why the run ended; None when every key was matched
    revision: Revision


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

    async def advance_epoch(self, model_id: str, number: int, *, timeout_s: float) -> Revision:
        """Make a registered epoch the model's current one. O(1): older versions become first victims."""
        ...

    async def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult: ...

    def read(self, refs: Sequence[BlockRef], *, timeout_s: float) -> AsyncIterator[ReadItem]:
        """Frames in the order of `refs`, one ReadItem each, unless the stream breaks (raises)."""
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

    async def report(self, refs: Sequence[BlockRef], *, timeout_s: float) -> int:
        """A reader found these corrupt. The shard verifies its own copy and retires what fails; how many."""
        ...

    async def status(self, *, timeout_s: float) -> ShardStatus: ...

    async def close(self) -> None: ...
