"""Nouns to messages and back: what is named, matched, written. Total on what comes in.

A message that does not parse into a noun (a key column of odd length, an unknown quality) raises
ConfigError on the server, hence INVALID_ARGUMENT; an answer that does not raises ValueError or ConfigError
on the client, hence Unavailable. Bytes from a peer never raise anything else. History (epochs, listings,
watches) is in wire_history.py, errors in faults.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

from kvstore.core.retention import Retention
from kvstore.errors import ConfigError, OverLimit
from kvstore.nouns import (
    KEY_NBYTES,
    KEYS_MAX,
    NAMESPACE_ID_NBYTES,
    OFFERS_MAX,
    WEIGHTS_DIGEST_NBYTES,
    BlockKey,
    BlockRef,
    Epoch,
    Incarnation,
    KVLayout,
    LeaseId,
    MissReason,
    NamespaceId,
    NamespaceSpec,
    Quality,
    Refusal,
    Revision,
    ShardId,
    Snapshot,
    WeightsDigest,
)
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import (
    QUALITIES,
    TIERS,
    Announced,
    BlockOffer,
    CommitResult,
    MatchResult,
    ShardStatus,
)
from kvstore.v1 import control_pb2 as control
from kvstore.v1 import topology_pb2 as topology

_KEYS: Final = struct.Struct(f"{KEY_NBYTES}s")
_DIGEST: Final = WEIGHTS_DIGEST_NBYTES
_LEASE_S_MAX: Final = 86_400.0
_NAME_CHARS_MAX: Final = 256


def fixed(data: bytes, nbytes: int, what: str) -> bytes:
    """A field of known length. Raises ConfigError, naming the field."""
    if len(data) != nbytes:
        raise ConfigError(f"{what} has {len(data)} bytes: it must have {nbytes}")
    return data


def at_most(most: int, count: int, what: str) -> None:
    """Asked of a message before anything is made of it: its size is its sender's choice. Raises OverLimit."""
    if count > most:
        raise OverLimit(f"{count} {what} in one call: at most {most}")


def split_keys(data: bytes, most: int = KEYS_MAX) -> list[BlockKey]:
    if len(data) % KEY_NBYTES:
        raise ConfigError(f"a key column of {len(data)} bytes is not a multiple of {KEY_NBYTES}")
    at_most(most, len(data) // KEY_NBYTES, "keys")
    return [key for (key,) in _KEYS.iter_unpack(data)]


def name_in(name: str, what: str) -> str:
    """A name the shard keeps, hence bounded. Raises ConfigError."""
    if len(name) > _NAME_CHARS_MAX:
        raise ConfigError(f"{what} name of {len(name)} characters: at most {_NAME_CHARS_MAX}")
    return name


def owner_in(name: str) -> str:
    """Who holds a lease. Raises ConfigError."""
    return name_in(name, "an owner's")


def model_in(name: str) -> str:
    """Raises ConfigError."""
    return name_in(name, "a model's")


def namespace_in(data: bytes) -> NamespaceId:
    return NamespaceId(fixed(data, NAMESPACE_ID_NBYTES, "namespace_id"))


def quality_in(value: int) -> Quality:
    try:
        return Quality(value)
    except ValueError:
        raise ConfigError(
            f"quality {value} is unknown: this shard knows {[int(q) for q in Quality]}"
        ) from None


def epoch_out(epoch: Epoch) -> control.Epoch:
    return control.Epoch(number=epoch.number, weights_digest=epoch.weights_digest)


def epoch_in(message: control.Epoch) -> Epoch:
    digest = fixed(message.weights_digest, WEIGHTS_DIGEST_NBYTES, "weights_digest")
    return Epoch(message.number, WeightsDigest(digest))


def revision_out(revision: Revision) -> control.Revision:
    return control.Revision(incarnation=revision.incarnation, counter=revision.counter)


def revision_in(message: control.Revision) -> Revision:
    return Revision(Incarnation(message.incarnation), message.counter)


def spec_out(spec: NamespaceSpec, tenant: str) -> control.OpenNamespaceRequest:
    layout = spec.layout
    return control.OpenNamespaceRequest(
        model_id=spec.model_id,
        layout=control.Layout(
            layers=layout.layers,
            head_begin=layout.head_begin,
            head_end=layout.head_end,
            head_dim=layout.head_dim,
            block_tokens=layout.block_tokens,
            dtype=layout.dtype,
        ),
        tokenizer_digest=spec.tokenizer_digest,
        adapter_digest=spec.adapter_digest,
        tenant=tenant,
    )


def spec_in(message: control.OpenNamespaceRequest) -> NamespaceSpec:
    layout = message.layout
    try:
        shape = KVLayout(
            layout.layers,
            layout.head_begin,
            layout.head_end,
            layout.head_dim,
            layout.dtype,
            layout.block_tokens,
        )
    except ValueError as error:
        raise ConfigError(f"layout: {error}") from None
    return NamespaceSpec(
        model_in(message.model_id),
        shape,
        fixed(message.tokenizer_digest, _DIGEST, "tokenizer_digest"),
        fixed(message.adapter_digest, _DIGEST, "adapter_digest"),
    )


def lease_ms(seconds: float) -> int:
    """As the wire has it. The shard has bounds of its own; here it only has to fit."""
    return round(min(max(0.0, seconds), _LEASE_S_MAX) * 1000)  # in this order: not a number is 0 too


def match_out(
    snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float
) -> control.MatchRequest:
    revision = None if snapshot.revision is None else revision_out(snapshot.revision)
    return control.MatchRequest(
        namespace_id=snapshot.namespace,
        epoch=epoch_out(snapshot.epoch),
        min_quality=int(snapshot.min_quality),
        stale_lag_max=snapshot.stale_lag_max,
        revision=revision,
        keys=b"".join(keys),
        owner=owner,
        lease_ms=lease_ms(lease_s),
    )


def announce_out(snapshot: Snapshot, keys: Sequence[BlockKey], wait_s: float) -> control.AnnounceRequest:
    revision = None if snapshot.revision is None else revision_out(snapshot.revision)
    return control.AnnounceRequest(
        namespace_id=snapshot.namespace,
        epoch=epoch_out(snapshot.epoch),
        min_quality=int(snapshot.min_quality),
        stale_lag_max=snapshot.stale_lag_max,
        revision=revision,
        keys=b"".join(keys),
        wait_ms=lease_ms(wait_s),
    )


def announced_out(announced: Announced) -> control.AnnounceResponse:
    return control.AnnounceResponse(
        tiers=announced.tiers,
        coming=announced.coming,
        coming_nbytes=announced.coming_nbytes,
        promotion_nbytes_s=announced.promotion_nbytes_s,
    )


def announced_in(message: control.AnnounceResponse, keys_asked: int) -> Announced:
    """Raises ValueError for what no shard of ours answers."""
    tiers, rate = list(message.tiers), message.promotion_nbytes_s
    if len(tiers) > keys_asked or message.coming > len(tiers) or not TIERS.keys() >= set(tiers):
        raise ValueError(
            f"a run of {len(tiers)} blocks, {message.coming} of them coming, of {keys_asked} keys"
        )
    if not 0 <= rate < math.inf:
        raise ValueError(f"a promotion rate of {rate}")
    return Announced(tiers, message.coming, message.coming_nbytes, rate)


def snapshot_in(message: control.MatchRequest | control.AnnounceRequest) -> Snapshot:
    return Snapshot(
        namespace_in(message.namespace_id),
        epoch_in(message.epoch),
        quality_in(message.min_quality),
        message.stale_lag_max,
        revision_in(message.revision) if message.HasField("revision") else None,
    )


def match_result_out(result: MatchResult) -> control.MatchResponse:
    return control.MatchResponse(
        slots=result.slots,
        generations=result.generations,
        epochs=[epoch_out(epoch) for epoch in result.epochs],
        epoch_indexes=result.epoch_indexes,
        qualities=result.qualities,
        tiers=result.tiers,
        nbytes=result.nbytes,
        lease=result.lease or 0,
        miss=result.miss.value if result.miss else "",
        revision=revision_out(result.revision),
    )


def match_result_in(message: control.MatchResponse, keys_asked: int) -> MatchResult:
    """Raises ValueError for columns that do not fit each other, or say what we have no word for."""
    slots, generations = message.slots, message.generations  # protobuf's own sequences will do
    qualities, tiers, nbytes = message.qualities, message.tiers, message.nbytes
    epochs = tuple(epoch_in(epoch) for epoch in message.epochs)
    indexes = list(message.epoch_indexes) or [0] * (len(slots) if len(epochs) != 1 else 0)
    lengths = {len(column) for column in (slots, generations, qualities, tiers, nbytes)}
    if len(slots) > keys_asked:
        raise ValueError(f"a match of {len(slots)} blocks for {keys_asked} keys")
    if len(lengths) != 1 or (indexes and (len(indexes) != len(slots) or max(indexes) >= len(epochs))):
        raise ValueError("the columns of a match do not fit each other")
    if (slots and not epochs) or not QUALITIES.keys() >= set(qualities) or not TIERS.keys() >= set(tiers):
        raise ValueError("a match of a quality, tier or epoch we do not know")
    return MatchResult(
        slots,
        generations,
        epochs,
        indexes,
        qualities,
        tiers,
        nbytes,
        LeaseId(message.lease) if message.lease else None,
        MissReason(message.miss) if message.miss else None,
        revision_in(message.revision),
    )


def begin_out(
    namespace: NamespaceId,
    epoch: Epoch,
    quality: Quality,
    offers: Sequence[BlockOffer],
    owner: str,
    lease_s: float,
    request_id: bytes,
) -> control.BeginRequest:
    return control.BeginRequest(
        namespace_id=namespace,
        epoch=epoch_out(epoch),
        quality=int(quality),
        keys=b"".join(o.key for o in offers),
        parents=b"".join(o.parent for o in offers),
        placements=b"".join(o.placement for o in offers),
        chain_indexes=[o.chain_index for o in offers],
        nbytes=[o.nbytes for o in offers],
        owner=owner,
        lease_ms=lease_ms(lease_s),
        request_id=request_id,
        **_retentions_out(offers),
    )


def _retentions_out(offers: Sequence[BlockOffer]) -> dict[str, list[int]]:
    """Columns, if anything is said at all."""
    said = [offer.retention for offer in offers]
    if not any(said):
        return {}
    return {
        "priorities": [1 + r.priority if r else 0 for r in said],
        "ttls_ms": [max(1, round(r.ttl_s * 1000)) if r and r.ttl_s else 0 for r in said],
    }


def _retentions_in(message: control.BeginRequest, offers: int) -> list[Retention | None]:
    if not message.priorities and not message.ttls_ms:
        return [None] * offers
    rows = zip(message.priorities, message.ttls_ms, strict=True)
    return [Retention(p - 1, ttl_ms / 1000 if ttl_ms else None) if p else None for p, ttl_ms in rows]


def offers_in(message: control.BeginRequest) -> list[BlockOffer]:
    at_most(OFFERS_MAX, max(len(message.nbytes), len(message.chain_indexes)), "offers")
    keys, parents = split_keys(message.keys), split_keys(message.parents)
    placements = split_keys(message.placements)
    lengths = {len(keys), len(parents), len(placements), len(message.chain_indexes), len(message.nbytes)}
    if message.priorities or message.ttls_ms:
        lengths |= {len(message.priorities), len(message.ttls_ms)}
    if len(lengths) != 1:
        raise ConfigError(f"the columns of an offer have different lengths: {sorted(lengths)}")
    retentions = _retentions_in(message, len(keys))
    columns = zip(keys, parents, message.chain_indexes, placements, message.nbytes, retentions, strict=True)
    return [BlockOffer(*row) for row in columns]


def refusals_in(names: Sequence[str]) -> tuple[Refusal | None, ...]:
    return tuple(Refusal(name) if name else None for name in names)


def refusals_out(refusals: Sequence[Refusal | None]) -> list[str]:
    return [refusal.value if refusal else "" for refusal in refusals]


def commit_out(result: CommitResult) -> control.CommitResponse:
    blocks = result.blocks
    return control.CommitResponse(
        revision=revision_out(result.revision),
        refusals=[b.value if isinstance(b, Refusal) else "" for b in blocks],
        slots=[0 if isinstance(b, Refusal) else b.slot for b in blocks],
        generations=[0 if isinstance(b, Refusal) else b.generation for b in blocks],
        lease=result.lease or 0,
    )


def commit_in(shard: ShardId, message: control.CommitResponse) -> CommitResult:
    revision = revision_in(message.revision)
    rows = zip(message.refusals, message.slots, message.generations, strict=True)
    blocks = tuple(
        Refusal(refusal) if refusal else BlockRef(shard, revision.incarnation, slot, generation)
        for refusal, slot, generation in rows
    )
    return CommitResult(revision, blocks, LeaseId(message.lease) if message.lease else None)


def status_out(status: ShardStatus) -> control.StatusResponse:
    fields = {name: getattr(status, name) for name in control.StatusResponse.DESCRIPTOR.fields_by_name}
    return control.StatusResponse(**fields)


def status_in(message: control.StatusResponse) -> ShardStatus:
    fields = {name: getattr(message, name) for name in control.StatusResponse.DESCRIPTOR.fields_by_name}
    return ShardStatus(**fields | {"counters": dict(message.counters)})


def topology_out(value: Topology) -> topology.Topology:
    shards = [topology.ShardEntry(shard=e.shard, address=e.address, weight=e.weight) for e in value.shards]
    return topology.Topology(version=value.version, shards=shards)


def topology_in(message: topology.Topology) -> Topology:
    shards = (ShardEntry(ShardId(e.shard), e.address, e.weight) for e in message.shards)
    return Topology(message.version, tuple(shards))
