"""Every error the store raises, one tree, each mapped onto one gRPC status.

    KVStrataError
    +-- ConfigError            INVALID_ARGUMENT     a setting is wrong: the message names it and the cure
    +-- CorruptBlock           DATA_LOSS            bytes that are not the frame they claim to be
    +-- NotFound               NOT_FOUND            a namespace, txn or lease that is not (any more) there
    +-- EpochUnknown           FAILED_PRECONDITION  the epoch was never registered on this shard
    +-- EpochConflict          ALREADY_EXISTS       an epoch number is bound to other weights
    +-- LeaseExpired           ABORTED              the owner did not renew in time; its work is gone
    +-- OverLimit              RESOURCE_EXHAUSTED   a queue, message, lease or slot bound was reached
    +-- WireVersionMismatch    UNIMPLEMENTED        the peers share no wire version
    +-- Compacted              OUT_OF_RANGE         a revision below the horizon, or of another incarnation
    +-- Unauthenticated        UNAUTHENTICATED      no token, or not a valid one
    +-- PermissionDenied       PERMISSION_DENIED    somebody else's namespace, or an admin's call
    +-- Unavailable            UNAVAILABLE          the shard is down, draining or unreachable
    |   +-- Incomplete         (a client's own)     some shards did what all were asked to do
    +-- DeadlineExceeded       DEADLINE_EXCEEDED    no answer within the caller's bound

A *miss* is not an error: it is an ordinary answer with a `MissReason`. Messages say what happened, to
what, and what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from kvstore.nouns import MissReason, ShardId


class KVStrataError(Exception):
    """Root of the tree. `status` is the name of the gRPC status code the error travels as."""

    status: ClassVar[str] = "INTERNAL"


class ConfigError(KVStrataError):
    status = "INVALID_ARGUMENT"


class CorruptBlock(KVStrataError):
    """Bytes that are not the frame they claim to be. `reason` is the miss a reader counts."""

    status = "DATA_LOSS"

    def __init__(self, reason: MissReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotFound(KVStrataError):
    status = "NOT_FOUND"


class EpochUnknown(KVStrataError):
    status = "FAILED_PRECONDITION"


class EpochConflict(KVStrataError):
    status = "ALREADY_EXISTS"


class LeaseExpired(KVStrataError):
    status = "ABORTED"


class OverLimit(KVStrataError):
    """With `retry_after_s` nothing was done and the call may succeed after so long; None: it will not."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WireVersionMismatch(KVStrataError):
    status = "UNIMPLEMENTED"


class Compacted(KVStrataError):
    status = "OUT_OF_RANGE"


class Unauthenticated(KVStrataError):
    status = "UNAUTHENTICATED"


class PermissionDenied(KVStrataError):
    status = "PERMISSION_DENIED"


class Unavailable(KVStrataError):
    status = "UNAVAILABLE"


class Incomplete(Unavailable):
    """Some shards did what all were asked to: their answers are in `done`, the others' errors in `failed`."""

    def __init__(
        self, message: str, done: Mapping[ShardId, object], failed: Mapping[ShardId, KVStrataError]
    ) -> None:
        super().__init__(message)
        self.done = dict(done)
        self.failed = dict(failed)


class DeadlineExceeded(KVStrataError):
    status = "DEADLINE_EXCEEDED"


ERRORS: Final[dict[str, type[KVStrataError]]] = {
    kind.__name__: kind
    for kind in (
        Compacted,
        ConfigError,
        DeadlineExceeded,
        EpochConflict,
        EpochUnknown,
        LeaseExpired,
        NotFound,
        OverLimit,
        PermissionDenied,
        Unauthenticated,
        Unavailable,
        WireVersionMismatch,
    )
}
"""The errors that travel over the wire by name (`kvstrata-error` in the trailing metadata)."""
