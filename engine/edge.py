"""The edge shard: a worker's own pool as a shard of the store, and so the engine's local prefix cache.

The same core and driver as a home shard's, over the pool's slots (kvstore/tiers/device.py). A full block that
the engine computed or onboarded is committed where it lies, without a copy; when its sequence ends it stays,
idle, until its slot is needed. A later request is lent what is there (engine/local_run.py) and reads it in
place.

    lend -> LocalRun -> admitted -> filled ... -> end         on the event loop, like all of the core
    make_room(n)                                              idle blocks go; then what waiting requests hold

A lease stands for everything that is lent, renewed here; what a running sequence reads is safe even if one
were lost, since its slots are counted as used (kvstore/tiers/pool_slots.py). Cost: 0.15 ms to lend 46
blocks, 0.1 ms to commit one. A failure of the core costs a block's place in the cache, never its sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import structlog

from engine.local_run import LocalRun
from engine.types import Shortage
from kvstore.clock import Clock
from kvstore.core.shrinking import evict_idle
from kvstore.core.state import CoreLimits, Namespace, Offer
from kvstore.core.transactions import Txn
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.errors import KVStrataError
from kvstore.frame import HEADER_NBYTES
from kvstore.hashing import KeyChain
from kvstore.nouns import (
    DROP,
    ISOLATE,
    OFFERS_MAX,
    BlockMeta,
    BlockRef,
    Epoch,
    EpochsOfModel,
    LeaseId,
    NamespaceId,
    NamespaceSpec,
    PinnedBlock,
    Quality,
    ShardId,
    Snapshot,
    Tier,
    TxnId,
    allow_stale,
)
from kvstore.tiers.base import Place, place_of
from kvstore.tiers.device import DeviceTier, PagedPool
from kvstore.tiers.pool_slots import PoolSlots
from kvstore.transport.base import Purge

__all__ = ["EdgeShard"]

LEASE_S: Final = 30.0
"""Of what is lent to sequences. Peers' pins last no longer either, so an admission waits for none forever."""
RENEWALS_A_LEASE: Final = 3
PURGE_TIMEOUT_S: Final = 60.0

log = structlog.get_logger(__name__)


class EdgeShard:
    """One worker's, on its event loop. `counters`: "edge:" lent, kept, not_kept, evicted, recalled,
    leases_lost."""

    def __init__(
        self,
        worker_id: str,
        spec: NamespaceSpec,
        epoch: Epoch,
        pool: PagedPool,
        slots: PoolSlots,
        clock: Clock,
        *,
        min_quality: Quality = Quality.LOSSLESS,
        kv_quality: Quality = Quality.LOSSLESS,
    ) -> None:
        """`kv_quality` is the most that a block may be which lies in `pool`."""
        self.counters: Counter[str] = Counter()
        self.opened = asyncio.Event()  # set when a namespace is opened that was not
        self.admitting = 0  # admissions that count on the slots that are free now: nothing may arrive in them
        self.arriving = asyncio.Lock()  # held by who sets slots aside
        self.spec = spec
        self.epoch = epoch
        self.min_quality = min_quality
        self.kv_quality = kv_quality
        self.slots = slots
        self.tier = DeviceTier(pool, slots)
        self.fingerprint = spec.layout.fingerprint
        self.frame_nbytes = HEADER_NBYTES + pool.block_nbytes
        n_slots = len(slots)
        limits = CoreLimits(
            slots_max=n_slots, leases_max=CoreLimits().leases_max + n_slots, lease_s_max=LEASE_S
        )
        config = DriverConfig(
            ShardId(f"edge-{worker_id}"), n_slots * self.frame_nbytes, secrets.token_bytes(32), limits=limits
        )
        self.driver = ShardDriver(config, self.tier, clock)
        self.driver.core.register_epoch(spec.model_id, epoch)
        self.forgotten = 0  # how often something was deleted here because it was deleted elsewhere
        self._pool = pool
        self._clock = clock
        self._runs: dict[LocalRun, None] = {}  # in the order they came
        self._renewer: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """From here on leases are renewed, and what expired or was deleted is freed, by itself."""
        if self._renewer is None:
            self._renewer = asyncio.create_task(self._renew_forever(), name="renew local leases")

    async def close(self) -> None:
        if self._renewer is not None:
            self._renewer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewer
        await self.driver.close()

    # -- what sequences do -------------------------------------------------------------------------

    def lend(
        self,
        namespace: NamespaceId,
        tenant: str,
        chain: KeyChain,
        blocks_max: int,
        owner: str,
        *,
        least: Quality | None = None,
    ) -> LocalRun:
        """A sequence's share of the pool's cache: the first blocks of its chain that lie here, at most
        `blocks_max` and of the quality `least` or better (None: the worker's own), under a lease, and the way
        for its own full blocks to stay. Always an answer, maybe an empty one."""
        run = LocalRun(self, namespace, chain, owner)
        self._runs[run] = None
        core, now = self.driver.core, self._clock.now()
        snapshot = Snapshot(namespace, self.epoch, max(self.min_quality, least or self.min_quality))
        try:
            self.open(namespace, tenant)
            keys = chain.keys[: min(blocks_max, core.config.limits.keys_max)]
            matched = core.match(snapshot, keys, owner, LEASE_S, now)
        except KVStrataError as error:
            self._failed("lend", error)
            return run
        if matched.lease is not None:
            places = [Place(*place) for place in zip(matched.slots, matched.generations, strict=True)]
            blocks = [
                PinnedBlock(
                    key, self._ref(place), core.epochs.bound[epoch_id].epoch, Quality(quality), Tier.DEVICE
                )
                for key, place, epoch_id, quality in zip(
                    keys, places, matched.epoch_ids, matched.qualities, strict=False
                )
            ]
            run.lent(tuple(blocks), self.tier.lend(places), matched.lease)
            self.counters["edge:lent"] += len(blocks)
        return run

    def open(self, namespace: NamespaceId, tenant: str) -> None:
        """Under the id that the store made: keys are the same here and there. Idempotent. Raises OverLimit,
        ConfigError."""
        known = len(self.driver.core.index.spaces)
        self.driver.core.open_namespace(namespace, Namespace(self.spec.model_id, self.spec.layout, tenant))
        if len(self.driver.core.index.spaces) > known:
            self.opened.set()

    def namespaces(self) -> list[NamespaceId]:
        return list(self.driver.core.index.spaces)

    def follow(self, known: EpochsOfModel) -> None:
        """Be told what a shard of the store knows of our model's epochs: what is dropped there is dropped
        here, and nothing more of it is lent or kept. Raises EpochConflict if a number has other weights
        there."""
        core, model_id = self.driver.core, self.spec.model_id
        numbers = {epoch.number for epoch in known.registered}
        for epoch in known.registered:
            core.register_epoch(model_id, epoch)
        if known.oldest in numbers:
            core.advance_epoch(model_id, known.oldest, DROP)
        if known.current in numbers:
            core.advance_epoch(model_id, known.current, allow_stale(known.stale_lag_max))
        self.driver.reap()

    def check_epoch(self, epoch: Epoch) -> None:
        """Could weights that are to come be known here under this number? Binds nothing. Raises as `know`."""
        self.driver.core.epochs.check(self.spec.model_id, epoch)

    def know(self, epoch: Epoch) -> None:
        """Weights that are to come: the number is theirs from here on. Raises EpochConflict, OverLimit."""
        self.driver.core.register_epoch(self.spec.model_id, epoch)

    def change_epoch(self, epoch: Epoch) -> None:
        """What is lent and kept from here on is of this epoch. What lies here of others is lent to nobody any
        more, goes first, and stays while it is in use. Whatever the pool holds, it costs the same."""
        self.driver.core.advance_epoch(self.spec.model_id, epoch.number, ISOLATE)
        self.epoch = epoch
        self.driver.reap()

    def keep(self, run: LocalRun, indexes: Sequence[int], slots: Sequence[int], quality: Quality) -> None:
        """Commit full blocks of a running sequence under the slots they lie in. What is here already, as good
        or better, stays as it is, and the sequence's own copy goes with the sequence. It claims no more than
        this pool can hold, whatever it was read as.

        Nothing is kept of a sequence that began before something was forgotten here: what it read may have
        been deleted since. Nor of one that began under other weights: what it attends to is of both."""
        if run.begun_at != self.forgotten or run.epoch != self.epoch:
            return
        quality = min(quality, self.kv_quality)
        for first in range(0, len(indexes), OFFERS_MAX):
            part = slice(first, first + OFFERS_MAX)
            try:
                lease = self._commit(run, indexes[part], slots[part], quality)
            except KVStrataError as error:
                self._failed("keep", error)
                continue
            if lease is not None:
                run.leases.append(lease)
        self.driver.reap()  # lesser versions that were replaced are free

    def take_back(self, run: LocalRun) -> None:
        """Its blocks, lent or left here, are idle now, unless others use them."""
        slots, leases = run.slots, run.leases
        run.slots, run.leases = [], []
        self.slots.give_back(slots)
        self.driver.core.release(leases)
        self.driver.reap()

    def end(self, run: LocalRun) -> None:
        self.take_back(run)
        del self._runs[run]

    def make_room(self, n: int, keep: LocalRun | None) -> bool:
        """See that `n` slots are free, if giving up idle blocks and recalling what is lent to requests that
        wait (but not to `keep`) would do; if not, nothing is given up. Did anything change?"""
        lacking = n - self.slots.n_free
        if lacking <= 0:
            return False
        index, waiting = self.driver.core.index, self._waiting(keep)
        if index.rooms.idle_versions + self._recallable(waiting) < lacking:
            return False
        while index.rooms.idle_versions < lacking:
            self._recall(waiting.pop())  # who came last is served last
        evicted = evict_idle(self.driver.core, lacking)
        self.driver.reap()
        self.counters["edge:evicted"] += evicted
        return evicted > 0

    def give_room(self, shortage: Shortage, keep: LocalRun | None) -> None:
        """For a step that lacks slots: as `make_room`. If even that is too little, all that is idle; and all
        that can be recalled too, before a sequence that runs leaves for want of it."""
        lacking = shortage.slots
        if not self.make_room(self.slots.n_free + lacking, keep):
            for run in self._waiting(keep) if shortage.first is not None else ():
                self._recall(run)
            self.counters["edge:evicted"] += evict_idle(self.driver.core, lacking)
            self.driver.reap()

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """While a request is on its way into the engine."""
        self.admitting += 1
        try:
            yield
        finally:
            self.admitting -= 1

    def spare(self, n: int) -> int:
        """Set aside up to `n` slots for blocks from elsewhere, idle ones going for it; how many. None while a
        request is being admitted: it comes first."""
        if self.admitting:
            return 0
        lacking = n - self.slots.n_free
        if lacking > 0:
            self.counters["edge:evicted"] += evict_idle(self.driver.core, lacking)
            self.driver.reap()
        return self.tier.set_aside(n)

    def lies_here(self, txn_id: TxnId) -> None:
        """What the transaction stages lies in the pool."""
        txn = self.driver.core.txn(txn_id, self._clock.now())
        for i in txn.staged:
            self.driver.core.index.versions.tiers[txn.slots[i]] = Tier.DEVICE

    def _waiting(self, keep: LocalRun | None) -> list[LocalRun]:
        return [run for run in self._runs if run.waiting and run is not keep]

    def _recall(self, run: LocalRun) -> None:
        run.recall()
        self.counters["edge:recalled"] += 1

    def _recallable(self, waiting: Sequence[LocalRun]) -> int:
        """Blocks that nobody but these hold."""
        pins = self.driver.core.index.versions.pins
        held = Counter(block.ref.slot for run in waiting for block in run.blocks)
        return sum(pins[slot] == count for slot, count in held.items())

    async def forget(self, namespace: NamespaceId | None = None, epoch: int | None = None) -> int:
        """Drop what is kept here, of one namespace or all: it was deleted elsewhere, or is to be read anew.
        What runs goes on with what it was lent, and leaves nothing here. How many blocks went."""
        self.forgotten += 1
        return await self.empty(namespace, epoch)

    async def empty(self, namespace: NamespaceId | None = None, epoch: int | None = None) -> int:
        """As `forget`, where nothing speaks for a deletion: what runs may leave its blocks here."""
        opened = [space for space in self.namespaces() if namespace in (None, space)]
        purged = [
            await self.driver.purge(Purge(space, None, epoch), timeout_s=PURGE_TIMEOUT_S) for space in opened
        ]
        return sum(one.versions for one in purged)

    # -- truth -------------------------------------------------------------------------------------

    def gauges(self) -> dict[str, int]:
        counts = self.slots.counts()
        return {"gauge:slots_free": counts.free, "gauge:slots_kept": counts.kept}

    def lent_slots(self) -> list[int]:
        """Each as often as it is lent: what a check of conservation counts the users of slots by."""
        return [slot for run in self._runs for slot in run.slots]

    def check_integrity(self) -> None:
        """The core's conservation, and that each block it knows has the slot it should. Raises
        AssertionError."""
        self.driver.check_integrity()
        live = {lease for run in self._runs for lease in run.leases}
        assert self.driver.core.leases >= len(live), "a running sequence lost its lease"

    # -- inside ------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Renew the leases of all that is lent."""
        now = self._clock.now()
        for run in self._runs:
            held = [lease for lease in run.leases if self.driver.core.renew(lease, LEASE_S, now)]
            self.counters["edge:leases_lost"] += len(run.leases) - len(held)
            run.leases = held

    async def _renew_forever(self) -> None:
        await self.driver.start()
        while True:
            await asyncio.sleep(LEASE_S / RENEWALS_A_LEASE)
            self.renew()

    def _commit(
        self, run: LocalRun, indexes: Sequence[int], slots: Sequence[int], quality: Quality
    ) -> LeaseId | None:
        core, now = self.driver.core, self._clock.now()
        blocks = [
            (run.describe(index, self.epoch, quality), slot)
            for index, slot in zip(indexes, slots, strict=True)
        ]
        txn = self._begin(run, blocks, quality)
        if txn.refused:
            # What exists must not be pinned: the sequence has a copy of its own, and would hold two slots.
            core.abort(txn.id)
            blocks = [block for i, block in enumerate(blocks) if i not in txn.refused]
            if not blocks:
                return None
            txn = self._begin(run, blocks, quality)
        self.lies_here(txn.id)
        for i, (meta, slot) in enumerate(blocks):
            version = core.granted(txn, i)
            if version is not None:
                self.tier.keep(place_of(version.ref), slot, meta)
                core.written(txn, i, None, now)
        answer = core.commit(txn.id, LEASE_S, now)
        self.counters["edge:kept"] += len(blocks) - len(answer.refused)
        return answer.lease

    def _begin(self, run: LocalRun, blocks: Sequence[tuple[BlockMeta, int]], quality: Quality) -> Txn:
        return self.driver.core.begin(
            run.namespace,
            self.epoch,
            quality,
            [Offer(m.key, m.parent, m.chain_index, m.placement, self.frame_nbytes) for m, _ in blocks],
            run.owner,
            LEASE_S,
            secrets.token_bytes(16),
            self._clock.now(),
        )

    def _ref(self, place: Place) -> BlockRef:
        return BlockRef(self.driver.shard, self.driver.config.incarnation, *place)

    def _failed(self, what: str, error: KVStrataError) -> None:
        self.counters["edge:not_kept" if what == "keep" else "edge:not_lent"] += 1
        log.warning("the local cache refused", what=what, error=str(error))
