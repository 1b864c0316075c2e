"""The nouns of the store: what every other file speaks of.

This module imports nothing of ours and does nothing: it names things. Read it first, then `core/`.
Everything here is immutable, cheap to copy and safe to share between threads.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType

BlockKey = NewType("BlockKey", bytes)  # 32 bytes: sha256 of a block's whole past, see hashing.py
NamespaceId = NewType("NamespaceId", bytes)  # 16 bytes, keyed by the cluster's secret, made by the server
WeightsDigest = NewType("WeightsDigest", bytes)  # 16 bytes over tensors, rope config and dtype
LayoutFingerprint = NewType("LayoutFingerprint", bytes)  # 16 bytes over every field of a KVLayout
ShardId = NewType("ShardId", str)  # stable across restarts: placement hashes it
Incarnation = NewType("Incarnation", int)  # random 64 bits a shard draws at start
LeaseId = NewType("LeaseId", int)
TxnId = NewType("TxnId", int)

KEY_NBYTES: Final = 32
NAMESPACE_ID_NBYTES: Final = 16
WEIGHTS_DIGEST_NBYTES: Final = 16
FINGERPRINT_NBYTES: Final = 16
BLOCK_TOKENS: Final = 32
"""Tokens a block holds unless its layout says otherwise."""
ROOT_KEY: Final = BlockKey(bytes(KEY_NBYTES))
"""The parent of every chain's first block."""

OFFERS_MAX: Final = 1_024
"""Blocks of one transaction: what every shard takes and no writer exceeds."""
KEYS_MAX: Final = 8_192
"""Keys or references of one call: what a shard looks at in one turn."""
LEASES_MAX: Final = 16_384
"""Leases of one call."""

DTYPE_NBYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one block outside an engine: contiguous `[layer][k,v][token][kv_head][head_dim]`.

    `head_begin:head_end` is the range of the model's KV heads the block holds (all of them, unless a
    tensor-parallel rank writes its own share).

    >>> KVLayout(30, 0, 3, 64, "float32").block_nbytes
    1474560
    """

    layers: int
    head_begin: int
    head_end: int
    head_dim: int
    dtype: str
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NBYTES:
            raise ValueError(f"dtype {self.dtype!r} is unknown: use one of {sorted(DTYPE_NBYTES)}")
        if not (0 <= self.head_begin < self.head_end):
            raise ValueError(f"head range [{self.head_begin}, {self.head_end}) is empty")
        if min(self.layers, self.head_dim, self.block_tokens) < 1:
            raise ValueError("layers, head_dim and block_tokens must be at least 1")

    @property
    def kv_heads(self) -> int:
        return self.head_end - self.head_begin

    @property
    def token_nbytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * DTYPE_NBYTES[self.dtype]

    @property
    def block_nbytes(self) -> int:
        return self.token_nbytes * self.block_tokens

    def canonical(self) -> bytes:
        """The one byte string that stands for this layout in digests."""
        numbers = (self.layers, self.head_begin, self.head_end, self.head_dim, self.block_tokens)
        return b"kvstrata.layout.1\0" + struct.pack("<5I", *numbers) + self.dtype.encode() + b"\0"

    @property
    def fingerprint(self) -> LayoutFingerprint:
        return LayoutFingerprint(hashlib.sha256(self.canonical()).digest()[:FINGERPRINT_NBYTES])


@dataclass(frozen=True, slots=True)
class NamespaceSpec:
    """Everything that makes KV bytes interchangeable except the weights and the tenant.

    The server adds the authenticated tenant and answers with a `NamespaceId`: a client never makes one.
    """

    model_id: str
    layout: KVLayout
    tokenizer_digest: bytes  # 16 bytes: tokenizer and chat template
    adapter_digest: bytes = bytes(16)  # zeros: no adapter


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """One set of weights. The digest decides equality of KV; the number only orders epochs."""

    number: int
    weights_digest: WeightsDigest


@dataclass(frozen=True, slots=True)
class EpochPolicy:
    """What advancing a model's epoch means for KV of older ones.

    Whatever it says, in-flight requests keep what they have pinned, and an engine that still runs older
    weights goes on with KV of its own epoch unless that is dropped.
    """

    stale_lag_max: int = 0  # how many epochs older than its own a snapshot may see at most
    drop_older: bool = False  # refuse matches and transactions at older epochs from here on


ISOLATE: Final = EpochPolicy()
"""New weights never meet old KV: the default."""
DROP: Final = EpochPolicy(drop_older=True)


def allow_stale(epochs: int) -> EpochPolicy:
    """Snapshots that ask for it may see KV that is up to `epochs` epochs older than their own."""
    return EpochPolicy(stale_lag_max=epochs)


@dataclass(frozen=True, slots=True)
class EpochsOfModel:
    """What one shard knows of a model's epochs. An unknown model has none, and its current one is 0."""

    registered: tuple[Epoch, ...]  # by number
    current: int
    stale_lag_max: int
    oldest: int  # epochs below it are dropped


class KnownNamespace(NamedTuple):
    """A namespace that is open on a shard: what an operator chooses from."""

    id: NamespaceId
    model_id: str
    tenant: str
    block_nbytes: int  # of a payload no codec touched


class Quality(enum.IntEnum):
    """What a payload went through, ordered by measured loss: higher is closer to the exact bytes.

    Gaps leave room for codecs to come. Numbers are in frames on disk: never renumber.
    """

    LOSSLESS = 1000
    INT8 = 800
    FP8 = 700
    K4V4 = 600
    K4V3 = 550
    INT4_HADAMARD = 500
    INT4 = 400


class Tier(enum.IntEnum):
    """Where a shard holds the bytes. No residence on a shard means the block is remote to it."""

    DEVICE = 1
    HOST = 2
    NVME = 3


class Revision(NamedTuple):
    """A point in one shard's history. Revisions of different incarnations do not compare."""

    incarnation: Incarnation
    counter: int


class BlockRef(NamedTuple):
    """One version's bytes on one shard. Any reuse of the slot bumps its generation, so a stale
    reference is a miss, never other data."""

    shard: ShardId
    incarnation: Incarnation
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class BlockMeta:
    """What a block is, apart from its bytes: the identity half of a frame's header."""

    namespace: NamespaceId
    key: BlockKey
    parent: BlockKey
    chain_index: int  # 0 for the first block of a chain
    placement: BlockKey  # key of the first block of this block's stripe: what placement hashes
    epoch: Epoch
    quality: Quality
    fingerprint: LayoutFingerprint


class PinnedBlock(NamedTuple):
    """A block a match or a commit found readable and holds for its owner: what read() takes."""

    key: BlockKey
    ref: BlockRef
    epoch: Epoch
    quality: Quality
    tier: Tier


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a reader is willing to see. Client-local: opening one costs nothing."""

    namespace: NamespaceId
    epoch: Epoch
    min_quality: Quality = Quality.LOSSLESS
    stale_lag_max: int = 0  # how many epochs older than `epoch` may be seen; 0: none
    revision: Revision | None = None  # None: latest


class ChangeKind(enum.IntEnum):
    """What a watch tells of. Numbers are on the wire: never renumber."""

    COMMITTED = 1
    RETIRED = 2  # out of sight: a better quality landed, or it was evicted, purged or found corrupt
    EPOCH = 3  # the model's current epoch, or what it allows, changed
    PURGED = 4  # everything of a namespace, or of one of its epochs
    MOVED = 5  # it lies on other tiers from now on, `tier` the fastest of them


class Change(NamedTuple):
    """One change of one shard. All changes of a commit share its revision."""

    revision: int
    kind: ChangeKind
    namespace: NamespaceId
    key: BlockKey  # ROOT_KEY where no single block is meant
    epoch: int  # 0 where every epoch is meant
    quality: int  # 0 where none is meant
    tier: int = 0  # the fastest the version lies on; 0 where no single block is meant


class Listed(NamedTuple):
    """One version in a listing."""

    key: BlockKey
    epoch: Epoch
    quality: Quality
    tier: Tier
    created: int  # revision counter of its commit
    nbytes: int


class MissReason(enum.Enum):
    """Why a block was not served. The list is closed; every miss has one and each is counted.

    The value is the label of the metric and the name on the wire; the order is append-only.
    """

    ABSENT = "absent"  # no version of this key was ever seen, or none is left
    OTHER_EPOCH = "other_epoch"  # versions exist, none of an epoch the snapshot may see
    LOW_QUALITY = "low_quality"  # visible but for min_quality
    NOT_YET = "not_yet"  # created after, or retired at or before, the snapshot's revision
    COMPACTED = "compacted"  # the snapshot's revision is below the horizon or of another incarnation
    STALE_REFERENCE = "stale_reference"  # incarnation or generation of the reference is past
    CHECKSUM = "checksum"  # the payload's or the header's checksum does not match
    BAD_HEADER = "bad_header"  # not a frame, truncated, or a format version we do not read
    OTHER_KEY = "other_key"  # a well-formed frame of another block
    OTHER_NAMESPACE = "other_namespace"
    OTHER_LAYOUT = "other_layout"
    OTHER_WEIGHTS = "other_weights"  # the frame's weights digest is not the snapshot's
    SHARD_UNAVAILABLE = "shard_unavailable"  # down, unreachable, or it broke off the transfer
    DEADLINE = "deadline"  # no answer within the caller's bound
    REFUSED = "refused"  # the shard said no: over its limits, draining, or another wire version
    DROPPED_EPOCH = "dropped_epoch"  # the snapshot's epoch was dropped: nothing of it is served any more


class Refusal(enum.Enum):
    """Why a key offered to a transaction was not taken. Also closed, also counted."""

    EXISTS = "exists"  # an equal or better version of the same epoch is visible: pinned instead
    STAGED = "staged"  # another transaction is writing it
    UNWRITTEN = "unwritten"  # granted, but its bytes never arrived before the commit
    NO_SPACE = "no_space"  # every slot is pinned or staged
    EPOCH = "epoch"  # the epoch was never registered, or is retired
    CHECKSUM = "checksum"  # the bytes that arrived are not the bytes that were framed
    BAD_HEADER = "bad_header"
    MISMATCH = "mismatch"  # the frame is not of the txn's namespace, epoch, quality or layout
    LEASE_EXPIRED = "lease_expired"
    SHARD_UNAVAILABLE = "shard_unavailable"
    DEADLINE = "deadline"
    QUOTA = "quota"  # the tenant's share of the shard is used up by what is pinned or being written
    PURGED = "purged"  # the namespace, epoch or key was purged after the transaction began
