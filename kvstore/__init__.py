"""kvstrata's store. What most callers need, imported when it is first named: docs/python-api.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.client import StoreClient
    from kvstore.hashing import digest16
    from kvstore.merged_watch import Changed, Resync, Silent
    from kvstore.nouns import (
        DROP,
        ISOLATE,
        Epoch,
        EpochPolicy,
        KVLayout,
        MissReason,
        NamespaceSpec,
        Quality,
        Refusal,
        allow_stale,
    )
    from kvstore.retention import RetentionRange
    from kvstore.session import StoreSession

__all__ = [
    "DROP",
    "ISOLATE",
    "Changed",
    "Epoch",
    "EpochPolicy",
    "KVLayout",
    "MissReason",
    "NamespaceSpec",
    "Quality",
    "Refusal",
    "Resync",
    "RetentionRange",
    "Silent",
    "StoreClient",
    "StoreSession",
    "allow_stale",
    "digest16",
]

_HOMES = {
    "StoreClient": "client",
    "StoreSession": "session",
    "Changed": "merged_watch",
    "Resync": "merged_watch",
    "Silent": "merged_watch",
    "RetentionRange": "retention",
    "digest16": "hashing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvstore.{_HOMES.get(name, 'nouns')}"), name)
