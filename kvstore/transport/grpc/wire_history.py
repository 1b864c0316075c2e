"""Epochs, listings, watches, purges: nouns to messages and back. Total on what comes in, as wire.py is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from kvstore.errors import ConfigError
from kvstore.nouns import (
    NAMESPACE_ID_NBYTES,
    WEIGHTS_DIGEST_NBYTES,
    Change,
    ChangeKind,
    Epoch,
    EpochPolicy,
    EpochsOfModel,
    KnownNamespace,
    Listed,
    NamespaceId,
    Revision,
    WeightsDigest,
)
from kvstore.transport.base import QUALITIES, TIERS, ListPage, Purge, Purged, WatchBatch
from kvstore.transport.grpc import wire
from kvstore.v1 import control_pb2 as control

NAMESPACES_MAX: Final = 256  # of one watch
PAGE_MAX: Final = 8_192  # versions of one listing's page: a message of 0.6 MB
CHANGES_A_MESSAGE: Final = 4_096
_KINDS: Final = {int(kind): kind for kind in ChangeKind}


def policy_in(message: control.AdvanceEpochRequest) -> EpochPolicy:
    return EpochPolicy(message.stale_lag_max, message.drop_older)


def advance_out(model_id: str, number: int, policy: EpochPolicy) -> control.AdvanceEpochRequest:
    return control.AdvanceEpochRequest(
        model_id=model_id,
        number=number,
        stale_lag_max=policy.stale_lag_max,
        drop_older=policy.drop_older,
    )


def epochs_out(epochs: EpochsOfModel) -> control.ShowEpochsResponse:
    return control.ShowEpochsResponse(
        epochs=[wire.epoch_out(epoch) for epoch in epochs.registered],
        current=epochs.current,
        stale_lag_max=epochs.stale_lag_max,
        oldest=epochs.oldest,
    )


def epochs_in(message: control.ShowEpochsResponse) -> EpochsOfModel:
    registered = tuple(wire.epoch_in(epoch) for epoch in message.epochs)
    return EpochsOfModel(registered, message.current, message.stale_lag_max, message.oldest)


def known_out(known: Iterable[KnownNamespace]) -> control.ShowNamespacesResponse:
    return control.ShowNamespacesResponse(
        namespaces=[
            control.KnownNamespace(
                namespace_id=n.id, model_id=n.model_id, tenant=n.tenant, block_nbytes=n.block_nbytes
            )
            for n in known
        ]
    )


def known_in(message: control.ShowNamespacesResponse) -> tuple[KnownNamespace, ...]:
    return tuple(
        KnownNamespace(wire.namespace_in(n.namespace_id), n.model_id, n.tenant, n.block_nbytes)
        for n in message.namespaces
    )


def limit_in(limit: int) -> int:
    """Versions a page. Raises ConfigError for none."""
    if not limit:
        raise ConfigError("a page of 0 versions never ends: give a limit")
    return min(limit, PAGE_MAX)


def page_out(page: ListPage) -> control.ListResponse:
    versions = page.versions
    return control.ListResponse(
        revision=wire.revision_out(page.revision),
        keys=b"".join(v.key for v in versions),
        epoch_numbers=[v.epoch.number for v in versions],
        weights_digests=b"".join(v.epoch.weights_digest for v in versions),
        qualities=[int(v.quality) for v in versions],
        tiers=[int(v.tier) for v in versions],
        created=[v.created for v in versions],
        nbytes=[v.nbytes for v in versions],
        next_cursor=page.next_cursor,
    )


def page_in(message: control.ListResponse) -> ListPage:
    """Raises ValueError or ConfigError for columns that do not fit each other, or a word we do not have."""
    keys = wire.split_keys(message.keys, most=len(message.keys))  # an answer is as large as gRPC lets it be
    digests = split(message.weights_digests, WEIGHTS_DIGEST_NBYTES, "weights_digests")
    columns = (digests, message.epoch_numbers, message.qualities, message.tiers, message.created)
    if {len(column) for column in (*columns, message.nbytes)} != {len(keys)}:
        raise ValueError("the columns of a listing do not fit each other")
    if not QUALITIES.keys() >= set(message.qualities) or not TIERS.keys() >= set(message.tiers):
        raise ValueError("a listing of a quality or tier we do not know")
    versions = tuple(
        Listed(key, Epoch(number, WeightsDigest(digest)), QUALITIES[quality], TIERS[tier], created, nbytes)
        for key, digest, number, quality, tier, created, nbytes in zip(
            keys, *columns, message.nbytes, strict=True
        )
    )
    return ListPage(wire.revision_in(message.revision), versions, message.next_cursor)


def namespaces_in(ids: Sequence[bytes]) -> list[NamespaceId]:
    """Raises ConfigError for none, or too many."""
    if not 0 < len(ids) <= NAMESPACES_MAX:
        raise ConfigError(f"a watch of {len(ids)} namespaces: at least 1, at most {NAMESPACES_MAX}")
    return [wire.namespace_in(data) for data in ids]


def after_in(message: control.WatchRequest | control.ListRequest) -> Revision | None:
    name = "after" if isinstance(message, control.WatchRequest) else "revision"
    return wire.revision_in(getattr(message, name)) if message.HasField(name) else None


def batches_out(batch: WatchBatch) -> Iterator[control.WatchResponse]:
    """Messages of about CHANGES_A_MESSAGE changes at most, a revision never torn over two of them."""
    pending: list[Change] = []
    for revision, changes in itertools.groupby(batch.changes, key=lambda change: change.revision):
        pending.extend(changes)
        if len(pending) >= CHANGES_A_MESSAGE and revision != batch.revision.counter:
            yield _changes_out(Revision(batch.revision.incarnation, revision), pending)
            pending = []
    yield _changes_out(batch.revision, pending)


def _changes_out(revision: Revision, changes: Sequence[Change]) -> control.WatchResponse:
    return control.WatchResponse(
        revision=wire.revision_out(revision),
        revisions=[c.revision for c in changes],
        kinds=[int(c.kind) for c in changes],  # type: ignore[misc]  # the numbers are the same: a test holds it
        namespace_ids=b"".join(c.namespace for c in changes),
        keys=b"".join(c.key for c in changes),
        epoch_numbers=[c.epoch for c in changes],
        qualities=[c.quality for c in changes],
        tiers=[c.tier for c in changes],
    )


def batch_in(message: control.WatchResponse) -> WatchBatch:
    """Raises ValueError or ConfigError for columns that do not fit, are out of order, or say a new word."""
    keys = wire.split_keys(message.keys, most=len(message.keys))  # an answer is as large as gRPC lets it be
    namespaces = split(message.namespace_ids, NAMESPACE_ID_NBYTES, "namespace_ids")
    columns = (message.revisions, message.kinds, message.epoch_numbers, message.qualities, message.tiers)
    if {len(column) for column in (*columns, namespaces)} != {len(keys)}:
        raise ValueError("the columns of a watch do not fit each other")
    revision = wire.revision_in(message.revision)
    if not _in_order((*message.revisions, revision.counter)):
        raise ValueError("a watch out of order")
    if not _KINDS.keys() >= set(message.kinds):
        raise ValueError("a change of a kind we do not know")
    changes = tuple(
        Change(counter, _KINDS[kind], NamespaceId(namespace), key, *rest)
        for key, namespace, counter, kind, *rest in zip(keys, namespaces, *columns, strict=True)
    )
    return WatchBatch(revision, changes)


def _in_order(revisions: Iterable[int]) -> bool:
    return all(before <= after for before, after in itertools.pairwise(revisions))


def scope_out(scope: Purge) -> control.PurgeRequest:
    """Raises ConfigError where keys and an epoch are both given, or no keys at all."""
    _check_scope(scope)
    return control.PurgeRequest(
        namespace_id=scope.namespace, keys=b"".join(scope.keys or ()), epoch_number=scope.epoch
    )


def scope_in(message: control.PurgeRequest) -> Purge:
    keys = tuple(wire.split_keys(message.keys)) or None
    epoch = message.epoch_number if message.HasField("epoch_number") else None
    scope = Purge(wire.namespace_in(message.namespace_id), keys, epoch)
    _check_scope(scope)
    return scope


def _check_scope(scope: Purge) -> None:
    if scope.keys is not None and not scope.keys:
        raise ConfigError("a purge of no keys would be read as one of the whole namespace: name the keys")
    if scope.keys is not None and scope.epoch is not None:
        raise ConfigError("a purge of keys or of an epoch, not of both: purge the keys of every epoch")


def purged_out(purged: Purged) -> control.PurgeResponse:
    return control.PurgeResponse(
        revision=wire.revision_out(purged.revision), versions=purged.versions, nbytes=purged.nbytes
    )


def purged_in(message: control.PurgeResponse) -> Purged:
    return Purged(wire.revision_in(message.revision), message.versions, message.nbytes)


def split(data: bytes, nbytes: int, what: str) -> list[bytes]:
    """A column of entries of one length. Raises ConfigError, naming it."""
    if len(data) % nbytes:
        raise ConfigError(f"{what} of {len(data)} bytes is not a multiple of {nbytes}")
    return [data[i : i + nbytes] for i in range(0, len(data), nbytes)]
