"""Errors of our tree to what travels, and back: a status, a name, and when to try again.

A unary call carries them as trailing metadata, a Pipeline's answer as fields. Whatever arrives, one of
errors.py's comes out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import grpc

from kvstore.errors import ERRORS, DeadlineExceeded, KVStrataError, OverLimit, Unavailable

ERROR_METADATA: Final = "kvstrata-error"
PUSHBACK_METADATA: Final = "grpc-retry-pushback-ms"
INTERNAL: Final = "Internal"
INTERNAL_DETAIL: Final = "the shard failed: see its log"
_RETRY_MS_MAX: Final = 60_000


def metadata_of(error: KVStrataError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of a call that ends in this error."""
    named = ((ERROR_METADATA, type(error).__name__),)
    retry_ms = retry_ms_of(error)
    return (*named, (PUSHBACK_METADATA, str(retry_ms))) if retry_ms else named


def retry_ms_of(error: KVStrataError) -> int:
    """0 where repeating does not help."""
    after_s = error.retry_after_s if isinstance(error, OverLimit) else None
    return 0 if after_s is None else max(1, round(after_s * 1000))


def named(name: str, detail: str, retry_ms: int, shard: str) -> KVStrataError:
    """The error a peer named. One that we have no word for is a shard that cannot serve us."""
    kind = ERRORS.get(name)
    if kind is None:
        return Unavailable(f"shard {shard}: {detail or name}")
    if kind is OverLimit and 0 < retry_ms <= _RETRY_MS_MAX:
        return OverLimit(detail, retry_after_s=retry_ms / 1000)
    return kind(detail)


def error_in(error: grpc.aio.AioRpcError, shard: str) -> KVStrataError:
    """The error the server raised, or what the transport itself says of the peer."""
    trailing: dict[str, Any] = dict(_pairs(error.trailing_metadata()))
    name = str(trailing.get(ERROR_METADATA, ""))
    detail = error.details() or error.code().name
    if name in ERRORS:
        return named(name, detail, _milliseconds(trailing.get(PUSHBACK_METADATA)), shard)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"shard {shard} did not answer in time")
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # of gRPC's own bounds
        return OverLimit(f"shard {shard}: {detail}")
    return Unavailable(f"shard {shard}: {detail}")


def _pairs(metadata: Any) -> Iterable[tuple[str, Any]]:
    return metadata or ()


def _milliseconds(text: Any) -> int:
    shown = str(text)
    return int(shown) if shown.isascii() and shown.isdigit() and len(shown) < 10 else 0
