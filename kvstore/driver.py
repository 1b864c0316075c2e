"""The asynchronous driver of one shard's core: it performs the I/O the core names and feeds it back.

It is also the local transport: `ShardTransport` in process. All core calls happen on one event loop, so the
core needs no lock; checksums and copies of frames run in threads (xxh3 and memcpy release the GIL) and
their results are applied on the loop, after checking that what they were for is still there.

A read is served from the buffer the slot held when the reference was checked. A slot that is reused gets
another buffer, and its generation is checked again after the copy: stale is a miss, never other data.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import structlog

from kvstore import failpoints
from kvstore.clock import Clock, MonotonicClock
from kvstore.core.chain import State, Version
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, CoreLimits, Namespace, Offer, Txn
from kvstore.errors import ConfigError, CorruptBlock, NotFound
from kvstore.frame import HEADER_NBYTES, decode_frame
from kvstore.hashing import namespace_id, tenant_salt
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
    TxnId,
)
from kvstore.policies import POLICIES
from kvstore.tiers.base import TierStorage
from kvstore.transport.base import (
    WIRE_VERSION,
    BlockOffer,
    CommitResult,
    MatchHit,
    MatchResult,
    ReadItem,
    ShardHello,
    ShardStatus,
    TxnOpened,
)

log = structlog.get_logger(__name__)

DISK_VERSION = 1


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.randbits(64))


@dataclass(frozen=True, slots=True)
class DriverConfig:
    shard: ShardId
    capacity_nbytes: int
    cluster_secret: bytes = field(repr=False)
    incarnation: Incarnation = field(default_factory=new_incarnation)
    limits: CoreLimits = field(default_factory=CoreLimits)
    policy: str = "lru"
    reap_interval_s: float = 0.5
    faults: bool = False  # allows flip_stored_byte: tests and the demo's negative control

    def __post_init__(self) -> None:
        if len(self.cluster_secret) < 16:
            raise ConfigError("the cluster secret needs at least 16 bytes: it keys every namespace id")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r} is unknown: use one of {sorted(POLICIES)}")


class ShardDriver:
    def __init__(self, config: DriverConfig, storage: TierStorage, clock: Clock | None = None) -> None:
        self.config = config
        core = CoreConfig(config.shard, config.incarnation, config.capacity_nbytes, config.limits)
        self.core = ShardCore(core, POLICIES[config.policy])
        self._storage = storage
        self._clock = clock or MonotonicClock()
        self._reaper: asyncio.Task[None] | None = None

    @property
    def shard(self) -> ShardId:
        return self.config.shard

    async def start(self) -> None:
        """Start the reaper: expired leases are freed from here on, traffic or none."""
        if self._reaper is None:
            self._reaper = asyncio.create_task(self._reap_forever(), name=f"reaper-{self.shard}")

    async def close(self) -> None:
        if self._reaper is not None:
            self._reaper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reaper
            self._reaper = None

    def check_integrity(self) -> None:
        """The core's conservation check, and that storage holds just what the core knows to be written."""
        self._discard_freed()
        self.core.check_integrity()
        for version in self.core.index.versions():
            stored = self._storage.read(version.slot)
            assert (stored is not None) == version.written, f"slot {version.slot}: bytes and core disagree"

    # -- ShardTransport ----------------------------------------------------------------------------

    async def hello(self, *, timeout_s: float) -> ShardHello:
        return ShardHello(self.shard, self.config.incarnation, WIRE_VERSION, DISK_VERSION)

    async def open_namespace(self, spec: NamespaceSpec, tenant: str, *, timeout_s: float) -> NamespaceId:
        opened = namespace_id(tenant_salt(self.config.cluster_secret, tenant), spec)
        self.core.open_namespace(opened, Namespace(spec.model_id, spec.layout.fingerprint))
        return opened

    async def register_epoch(self, model_id: str, epoch: Epoch, *, timeout_s: float) -> None:
        self.core.register_epoch(model_id, epoch)

    async def advance_epoch(self, model_id: str, number: int, *, timeout_s: float) -> Revision:
        return self.core.advance_epoch(model_id, number)

    async def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult:
        matched = self.core.match(snapshot, keys, owner, lease_s, self._clock.now())
        revision = Revision(self.config.incarnation, self.core.revision)
        return MatchResult(tuple(map(self._hit, matched.versions)), matched.lease, matched.miss, revision)

    async def read(self, refs: Sequence[BlockRef], *, timeout_s: float) -> AsyncIterator[ReadItem]:
        for i, ref in enumerate(refs):
            frame = await self._read_frame(ref)
            yield ReadItem(i, None, frame) if isinstance(frame, MissReason) else ReadItem(i, frame, None)

    async def renew(self, leases: Sequence[LeaseId], lease_s: float, *, timeout_s: float) -> list[bool]:
        now = self._clock.now()
        return [self.core.renew(lease, lease_s, now) for lease in leases]

    async def release(self, leases: Sequence[LeaseId], *, timeout_s: float) -> None:
        for lease in leases:
            self.core.release(lease)
        self._discard_freed()

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
        asked = [Offer(o.key, o.parent, o.chain_index, o.placement, o.nbytes) for o in offers]
        now = self._clock.now()
        txn = self.core.begin(namespace, epoch, quality, asked, owner, lease_s, request_id, now)
        self._discard_freed()
        return TxnOpened(txn.id, tuple(txn.refusals))

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], *, timeout_s: float
    ) -> list[Refusal | None]:
        return [await self._write_frame(txn, *frame) for frame in frames]

    async def commit(self, txn: TxnId, pin_for_s: float | None, *, timeout_s: float) -> CommitResult:
        answer = self.core.commit(txn, pin_for_s, self._clock.now())
        self._discard_freed()
        return CommitResult(Revision(self.config.incarnation, answer.revision), answer.blocks, answer.lease)

    async def abort(self, txn: TxnId, *, timeout_s: float) -> None:
        self.core.abort(txn)
        self._discard_freed()

    async def report(self, refs: Sequence[BlockRef], *, timeout_s: float) -> int:
        """Check our own copy of what a reader found corrupt; retire what really is."""
        retired = 0
        for ref in refs:
            version = self.core.resolve(ref)
            if isinstance(version, MissReason) or version.state is not State.LIVE:
                continue
            intact = await asyncio.to_thread(self._is_intact, version)
            current = self.core.resolve(ref)
            if not intact and current is version:
                self.core.report(version)
                retired += 1
        self._discard_freed()
        return retired

    async def status(self, *, timeout_s: float) -> ShardStatus:
        usage = self.core.usage()
        return ShardStatus(
            shard=self.shard,
            incarnation=self.config.incarnation,
            revision=self.core.revision,
            capacity_nbytes=self.config.capacity_nbytes,
            live_nbytes=usage.live_nbytes,
            staged_nbytes=usage.staged_nbytes,
            retired_nbytes=usage.retired_nbytes,
            ownerless_nbytes=usage.ownerless_nbytes,
            versions=len(self.core.index),
            leases=self.core.leases,
            oldest_pin_s=self.core.oldest_pin_s(self._clock.now()),
            counters=dict(self.core.counters),
        )

    # -- faults on purpose -------------------------------------------------------------------------

    def flip_stored_byte(self) -> BlockKey | None:
        """Flip one payload byte of a live block, the head of a chain if there is one. None: store empty."""
        if not self.config.faults:
            raise ConfigError("faults are off on this shard: set store.faults = true to break blocks")
        live = [v for v in self.core.index.versions() if v.state is State.LIVE]
        if not live:
            return None
        victim = min(live, key=lambda v: v.chain_index)
        stored = self._storage.read(victim.slot)
        if stored is None:
            return None
        stored[HEADER_NBYTES + (victim.nbytes - HEADER_NBYTES) // 2] ^= 0x01
        return victim.key

    # -- inside ------------------------------------------------------------------------------------

    def _hit(self, version: Version) -> MatchHit:
        ref = self.core.ref(version)
        return MatchHit(ref, version.epoch, version.quality, version.tier, version.nbytes)

    async def _read_frame(self, ref: BlockRef) -> memoryview | MissReason:
        version = self.core.resolve(ref)
        if isinstance(version, MissReason):
            return version
        stored = self._storage.read(version.slot)
        if stored is None:
            return MissReason.STALE_REFERENCE
        await failpoints.hit("storage.read")
        copy = await asyncio.to_thread(bytearray, stored)
        if isinstance(self.core.resolve(ref), MissReason):
            return MissReason.STALE_REFERENCE
        return memoryview(copy)

    async def _write_frame(
        self, txn_id: TxnId, index: int, header: bytes, payload: memoryview
    ) -> Refusal | None:
        txn = self.core.txn(txn_id, self._clock.now())
        version = txn.versions[index] if index < len(txn.versions) else None
        if version is None or version.state is not State.STAGED or version.written:
            raise NotFound(f"offer {index} of transaction {txn_id} is not waiting for bytes")
        await failpoints.hit("storage.write")
        frame, refusal = await asyncio.to_thread(self._verified_copy, txn, version, header, payload)
        # The transaction may have expired while the thread copied: ask again before touching anything.
        txn = self.core.txn(txn_id, self._clock.now())
        self.core.written(txn, index, refusal)
        if refusal is None:
            self._storage.write(version.slot, frame)
        self._discard_freed()
        return refusal

    def _verified_copy(
        self, txn: Txn, version: Version, header: bytes, payload: memoryview
    ) -> tuple[bytearray, Refusal | None]:
        """Copy first, verify the copy: what is stored is what was checked."""
        copy = bytearray(header)
        copy += payload
        if len(copy) != version.nbytes:
            return copy, Refusal.MISMATCH
        try:
            frame, _ = decode_frame(memoryview(copy))
        except CorruptBlock as error:
            corrupt = error.reason is MissReason.CHECKSUM
            return copy, Refusal.CHECKSUM if corrupt else Refusal.BAD_HEADER
        meta = frame.meta
        claimed = (meta.key, meta.parent, meta.chain_index, meta.placement, meta.epoch, meta.quality)
        promised = (
            version.key,
            version.parent,
            version.chain_index,
            version.placement,
            version.epoch,
            version.quality,
        )
        namespace = self.core.namespace(txn.namespace)
        same = claimed == promised and meta.namespace == txn.namespace
        return copy, None if same and meta.fingerprint == namespace.fingerprint else Refusal.MISMATCH

    def _is_intact(self, version: Version) -> bool:
        stored = self._storage.read(version.slot)
        if stored is None:
            return False
        try:
            frame, _ = decode_frame(stored)
        except CorruptBlock:
            return False
        return frame.meta.key == version.key

    def _discard_freed(self) -> None:
        """Runs in the same loop step as the freeing, so no later write of the slot can be lost to it."""
        for slot in self.core.index.freed:
            self._storage.discard(slot)
        self.core.index.freed.clear()

    async def _reap_forever(self) -> None:
        while True:
            await asyncio.sleep(self.config.reap_interval_s)
            expired = self.core.reap(self._clock.now())
            self._discard_freed()
            if expired:
                log.info("leases expired", shard=self.shard, leases=expired)
