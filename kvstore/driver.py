"""The asynchronous driver of one shard's core: it performs the I/O the core names and feeds it back.

It is also the local transport: `ShardTransport` in process. All core calls happen on one event loop, so the
core needs no lock; big checksums and copies run in threads, and their results are applied on the loop,
after asking the core whether what they were for is still there. Calls that only ask the core never wait;
the others end within `timeout_s`, in DeadlineExceeded if need be.

A frame that arrives is copied first and verified in the copy: what is stored is what was checked. A read is
a copy too, and its reference is checked before and after: a slot that was reused meanwhile is a miss,
never other data. After `close` every call raises Unavailable.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Final, TypeVar

import structlog

from kvstore.announcements import Announcements
from kvstore.arrival import is_frame_of
from kvstore.clock import Clock, MonotonicClock
from kvstore.core.shard import ShardCore
from kvstore.core.state import Namespace, Offer
from kvstore.core.versions import State, Version
from kvstore.driver_config import DriverConfig
from kvstore.errors import ConfigError, DeadlineExceeded, OverLimit, Unavailable
from kvstore.hashing import namespace_id, tenant_salt
from kvstore.intake import Intake
from kvstore.mover import Mover
from kvstore.notes import Notes
from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    BlockRef,
    Epoch,
    EpochPolicy,
    EpochsOfModel,
    KnownNamespace,
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
from kvstore.policies.admission import ADMISSIONS
from kvstore.recovery import recover
from kvstore.tiers.base import TierStorage, place_of
from kvstore.tiers.copying import beside_the_loop
from kvstore.tiers.durable import AdvanceNote, DurableTier, EpochNote, NamespaceNote, Note
from kvstore.tiers.hierarchy import Tiers
from kvstore.transport.base import (
    WIRE_VERSION,
    Announced,
    BlockOffer,
    CommitResult,
    ListPage,
    MatchResult,
    Purge,
    Purged,
    ReadItem,
    ShardHello,
    ShardStatus,
    TxnOpened,
    WatchBatch,
)
from kvstore.upkeep import Upkeep
from kvstore.watching import Watchers

log = structlog.get_logger(__name__)

DISK_VERSION: Final = 1

Answer = TypeVar("Answer")


class ShardDriver:
    def __init__(
        self,
        config: DriverConfig,
        storage: TierStorage,
        clock: Clock | None = None,
        durable: DurableTier | None = None,
    ) -> None:
        """`storage` is the host's; `durable` lies below it, as far as `config.tiering` says."""
        self.config = config
        judges = (config.make_predictor, ADMISSIONS[config.admission]) if durable is not None else ()
        self.core = ShardCore(config.core(), POLICIES[config.policy], *judges)
        self._watchers = Watchers(self.core)
        self.storage = storage
        self.tiers = Tiers(storage, durable)
        self._clock = clock or MonotonicClock()
        self._notes = Notes(config.shard, durable)
        self._intake = Intake(self.core, storage, self._clock)
        self.mover: Mover | None = None
        self._upkeep = Upkeep(
            config, self.core, self.tiers, self._notes, self._clock, self._watchers, self._move
        )
        if durable is not None:
            # What the mover settles wakes nobody: it looks again by itself, and would wake itself for ever.
            settle = self._upkeep.settle
            self.mover = Mover(self.core, self.tiers, durable, self._clock, settle, config.encode_frame)
        self._announcements = Announcements(self.core, self.mover)
        self._closed = False

    @property
    def shard(self) -> ShardId:
        return self.config.shard

    async def start(self) -> None:
        """Recover; from here on the shard does by itself what it owes nobody in particular (upkeep.py)."""
        await self.recover()
        self._upkeep.start()

    async def recover(self) -> None:
        """Read what survived, and begin to move (mover.py). Before anything else is asked of the shard.

        Raises OSError and ConfigError when what survived cannot be read.
        """
        if self.mover is not None:
            await recover(self.core, self.tiers, self._notes)
            await self._upkeep.resize()
            self.mover.start()

    async def close(self) -> None:
        self._closed = True
        self._watchers.close()
        await self._upkeep.stop()
        if self.mover is not None:
            await self.mover.stop()
        if self.tiers.durable is not None:
            await self.tiers.durable.close()

    def reap(self) -> None:
        """Free what expired. `start` has it called regularly."""
        self._upkeep.reap()

    async def tick(self) -> None:
        """What `start` has done regularly: free what expired, and a bounded part of what was deleted."""
        await self._upkeep.tick()

    def check_integrity(self) -> None:
        """The core's conservation check, and that storage holds just what the core knows to be written.

        Raises AssertionError. Storage can only be compared while no write is on its way.
        """
        self._settle()
        self.core.check_integrity()
        self.tiers.check_integrity(self.core.index)

    # -- ShardTransport ----------------------------------------------------------------------------

    async def hello(self, *, timeout_s: float) -> ShardHello:
        self.serving()
        return ShardHello(self.shard, self.config.incarnation, WIRE_VERSION, DISK_VERSION)

    async def open_namespace(self, spec: NamespaceSpec, tenant: str, *, timeout_s: float) -> NamespaceId:
        opened = namespace_id(tenant_salt(self.config.cluster_secret, tenant), spec)
        self.serving().open_namespace(opened, Namespace(spec.model_id, spec.layout, tenant))
        await self._note(NamespaceNote(opened, spec.model_id, tenant, spec.layout), timeout_s)
        return opened

    async def register_epoch(self, model_id: str, epoch: Epoch, *, timeout_s: float) -> None:
        self.serving().register_epoch(model_id, epoch)
        await self._note(EpochNote(model_id, epoch), timeout_s)

    async def advance_epoch(
        self, model_id: str, number: int, policy: EpochPolicy = ISOLATE, *, timeout_s: float
    ) -> Revision:
        revision = self.serving().advance_epoch(model_id, number, policy)
        self._settle()
        if self.tiers.durable is not None:
            model, note = self.core.epochs.of(model_id), None
            if model.current == number:  # else it went on long ago
                epoch = self.core.epochs.bound[model.bound[number]].epoch
                await self._note(EpochNote(model_id, epoch), timeout_s)  # another's, perhaps still on its way
                note = AdvanceNote(model_id, number, policy)
            await self._within(self._notes.advanced(model_id, note), timeout_s, "a durable note")
        return revision

    async def epochs(self, model_id: str, *, timeout_s: float) -> EpochsOfModel:
        return self.serving().epochs.show(model_id)

    async def namespaces(self, *, timeout_s: float) -> tuple[KnownNamespace, ...]:
        spaces = ((s.id, s.namespace) for s in self.serving().index.spaces.values())
        return tuple(KnownNamespace(i, n.model_id, n.tenant, n.layout.block_nbytes) for i, n in spaces)

    async def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult:
        matched = self.serving().match(snapshot, keys, owner, lease_s, self._clock.now())
        self._move()
        revision = Revision(self.config.incarnation, self.core.revision)
        ids = dict.fromkeys(matched.epoch_ids)  # in the order they come in
        epochs = tuple(self.core.epochs.bound[epoch_id].epoch for epoch_id in ids)
        places = {epoch_id: place for place, epoch_id in enumerate(ids)}
        return MatchResult(
            slots=matched.slots,
            generations=matched.generations,
            epochs=epochs,
            epoch_indexes=[places[epoch_id] for epoch_id in matched.epoch_ids] if len(ids) > 1 else (),
            qualities=matched.qualities,
            tiers=matched.tiers,
            nbytes=matched.nbytes,
            lease=matched.lease,
            miss=matched.miss,
            revision=revision,
        )

    async def announce(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], wait_s: float, *, timeout_s: float
    ) -> Announced:
        self.serving()
        return await self._announcements.announce(snapshot, keys, wait_s, timeout_s)

    async def read(
        self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> AsyncIterator[ReadItem]:
        self.check_count(len(refs))
        end = self._clock.now() + timeout_s
        for i, ref in enumerate(refs):
            frame = await self._within(self._read_frame(namespace, ref), end - self._clock.now(), "read")
            yield ReadItem(i, None, frame) if isinstance(frame, MissReason) else ReadItem(i, frame, None)

    async def renew(self, leases: Sequence[LeaseId], lease_s: float, *, timeout_s: float) -> list[bool]:
        now = self._clock.now()
        return [self.serving().renew(lease, lease_s, now) for lease in leases]

    async def release(self, leases: Sequence[LeaseId], *, timeout_s: float) -> None:
        self.serving().release(leases)
        self._settle()

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
        asked = [Offer(o.key, o.parent, o.chain_index, o.placement, o.nbytes, o.retention) for o in offers]
        now = self._clock.now()
        txn = self.serving().begin(namespace, epoch, quality, asked, owner, lease_s, request_id, now)
        self._settle()
        return TxnOpened(txn.id, tuple(txn.refusals))

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], *, timeout_s: float
    ) -> list[Refusal | None]:
        self.serving()
        refusals = await self._within(self._intake.write(txn, frames), timeout_s, "write")
        self._settle()
        return refusals

    async def commit(self, txn: TxnId, pin_for_s: float | None, *, timeout_s: float) -> CommitResult:
        answer = self.serving().commit(txn, pin_for_s, self._clock.now())
        self._settle()
        revision = Revision(self.config.incarnation, answer.revision)
        return CommitResult(revision, self.core.blocks(answer), answer.lease)

    async def abort(self, txn: TxnId, *, timeout_s: float) -> None:
        self.serving().abort(txn)
        self._settle()

    async def report(self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float) -> int:
        """Check our own copy of what a reader found corrupt; retire what really is."""
        self.check_count(len(refs))
        return await self._within(self._retire_corrupt(namespace, refs), timeout_s, "report")

    async def listing(
        self, namespace: NamespaceId, at: Revision | None, cursor: int, limit: int, *, timeout_s: float
    ) -> ListPage:
        revision, versions, next_cursor = self.serving().past.listing(namespace, at, cursor, limit)
        return ListPage(revision, tuple(versions), next_cursor)

    def watch(
        self, namespaces: Sequence[NamespaceId], after: Revision | None, *, timeout_s: float
    ) -> AsyncIterator[WatchBatch]:
        self.serving()
        return self._watchers.watch(namespaces, after, timeout_s)

    async def purge(self, scope: Purge, *, timeout_s: float) -> Purged:
        """Invisible at once, durable and (but for what is pinned) freed when this returns."""
        self.serving()
        return await self._within(self._upkeep.purge(scope), timeout_s, "purge")

    async def compact(self, revision: Revision, *, timeout_s: float) -> Revision:
        return self.serving().past.compact(revision)

    async def status(self, *, timeout_s: float) -> ShardStatus:
        usage = self.serving().usage()
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
            nvme_nbytes=usage.nvme_nbytes,
            nvme_capacity_nbytes=self.core.index.nvme.capacity_nbytes,
            counters=dict(self.core.counters),
        )

    # -- faults on purpose -------------------------------------------------------------------------

    def flip_stored_byte(self) -> BlockKey | None:
        """Flip one payload byte of a live block that begins a chain; its key. None: no such block here."""
        if not self.config.faults:
            raise ConfigError("faults are off on this shard: set store.faults = true to break blocks")
        return self.tiers.flip_stored_byte(self.core.index)

    # -- inside ------------------------------------------------------------------------------------

    async def _note(self, note: Note, timeout_s: float) -> None:
        if self._notes.lack(note):
            await self._within(self._notes.keep(note), timeout_s, "a durable note")

    def _settle(self) -> None:
        """After whatever may have freed slots or let go of versions, in the same turn of the loop."""
        self._upkeep.settle()

    def _move(self) -> None:
        if self.mover is not None and self.core.moves.any_wanted():
            self.mover.wake()

    def serving(self) -> ShardCore:
        """Raises Unavailable once the driver is closed."""
        if self._closed:
            raise Unavailable(f"shard {self.shard} is closed: ask the topology who took over")
        return self.core

    def check_count(self, refs: int) -> None:
        if refs > self.config.limits.keys_max:
            raise OverLimit(f"{refs} references in one call: at most {self.config.limits.keys_max}")

    async def _within(self, work: Awaitable[Answer], timeout_s: float, what: str) -> Answer:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise DeadlineExceeded(
                f"{what} on {self.shard} took longer than {timeout_s:.3f} s: ask for less, or wait longer"
            ) from None

    async def _read_frame(self, namespace: NamespaceId, ref: BlockRef) -> memoryview | MissReason:
        version = self.serving().resolve(namespace, ref)
        if isinstance(version, MissReason):
            return version
        try:
            copy = await self.tiers.read(place_of(ref))
        except OSError as error:
            return self.failed_to_read(error)
        again = self.core.resolve(namespace, ref)
        if isinstance(again, MissReason):
            return again
        return self.lost(again) if copy is None else copy

    def failed_to_read(self, error: OSError) -> MissReason:
        self.core.counters["storage_error:read"] += 1
        log.warning("storage failed", shard=self.shard, what="read", error=str(error))
        return self.core.missed(MissReason.SHARD_UNAVAILABLE)

    def lost(self, version: Version) -> MissReason:
        """Storage has nothing where the version's bytes should be: out of sight, so that it can be written
        again."""
        self.core.report(version)
        self._settle()
        return self.core.missed(MissReason.ABSENT)

    async def _retire_corrupt(self, namespace: NamespaceId, refs: Sequence[BlockRef]) -> int:
        retired = 0
        for ref in refs:
            version = self.serving().resolve(namespace, ref)
            copy = await self._read_frame(namespace, ref)
            if isinstance(version, MissReason) or isinstance(copy, MissReason):
                continue  # already counted: reused since, or storage could not tell
            expected = version.meta(self.core.namespace(namespace).layout.fingerprint)
            intact = await beside_the_loop(copy.nbytes, functools.partial(is_frame_of, copy, expected))
            if not intact and version.state is State.LIVE:
                self.core.report(version)
                retired += 1
        self._settle()
        return retired
