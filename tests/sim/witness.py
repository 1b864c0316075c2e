"""What reached the shards, in one order: what a history's answers are judged by, or excused with.

A client knows when it asked and when it was answered; what happened in between, or because a message came
twice or long after its caller gave up, only the shard can tell. Requests are noted here as they are served.
Nothing is taken from what the shard answers: what follows from a request is worked out here, once more.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.clock import Clock
from kvstore.core.versions import ON_HOST, TO_HOST
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.frame import decode_header
from kvstore.mover import Mover
from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    Epoch,
    EpochPolicy,
    EpochsOfModel,
    Incarnation,
    KVLayout,
    NamespaceId,
    Revision,
    ShardId,
)
from kvstore.tiers.base import TierStorage
from kvstore.tiers.durable import DurableTier
from kvstore.transport.base import Purge, Purged, TxnOpened
from kvstore.upkeep import Upkeep
from kvstore.watching import Watchers
from tests.kvstore.oracle import FRAME_NBYTES, SPEC
from tests.sim.writings import Broken

SWEEP_SLOTS = 3
WATCH_BATCH = 4  # changes: small, so that revisions do not fit and streams are long
MOVED_FRAMES = 4  # of a batch of moves

Name = tuple[Incarnation, NamespaceId, BlockKey, int]  # of a register


@dataclass(frozen=True, slots=True)
class Policy:
    """What a shard allows from a step of the history on."""

    since: int
    current: int = 0
    lag: int = 0
    oldest: int = 0

    def allows(self, own: int, of: int, asked_lag: int) -> bool:
        """May a snapshot of epoch `own` see KV of epoch `of`?"""
        return of >= self.oldest and own >= self.oldest and 0 <= own - of <= min(self.lag, asked_lag)


@dataclass(frozen=True, slots=True)
class ServedPurge:
    step: int
    incarnation: Incarnation
    scope: Purge

    def covers(self, namespace: NamespaceId, key: BlockKey, epoch: int) -> bool:
        return covers(self.scope, namespace, key, epoch)


def covers(scope: Purge, namespace: NamespaceId, key: BlockKey, epoch: int) -> bool:
    of_all = scope.keys is None or key in scope.keys
    return scope.namespace == namespace and of_all and scope.epoch in (None, epoch)


@dataclass(slots=True)
class Witness:
    """`step` orders everything that is noted: no two things happen at the same step."""

    steps: int = 0
    policies: dict[ShardId, list[Policy]] = field(default_factory=dict)
    purges: list[ServedPurge] = field(default_factory=list)
    begun: dict[tuple[ShardId, int], int] = field(default_factory=dict)
    """Where and when a writing was last offered, by its number."""
    durable: dict[ShardId, Policy] = field(default_factory=dict)
    """The newest policy that a shard with a tier that survives has answered for."""
    asked: dict[ShardId, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    """Numbers and lags that a shard was asked to advance to."""
    appeared: dict[Name, list[int]] = field(default_factory=lambda: defaultdict(list))
    """When versions that nobody committed may have begun to be seen: made below, or restored."""

    def step(self) -> int:
        self.steps += 1
        return self.steps

    def born(self, shard: ShardId) -> None:
        self.policies.setdefault(shard, []).append(Policy(self.step()))

    def registered(self, shard: ShardId, number: int) -> None:
        if not self.policies[shard][-1].current:  # a model's first epoch is its current one
            self.policies[shard].append(Policy(self.step(), number))

    def advanced(self, shard: ShardId, number: int, policy: EpochPolicy) -> None:
        last = self.policies[shard][-1]
        if number >= last.current:
            oldest = number if policy.drop_older else last.oldest
            self.policies[shard].append(Policy(self.step(), number, policy.stale_lag_max, oldest))

    def kept(self, shard: ShardId, number: int, policy: EpochPolicy) -> None:
        """Answered: from here on no restart may undo it."""
        last = self.durable.get(shard, Policy(0))
        if number >= last.current:
            oldest = number if policy.drop_older else last.oldest
            self.durable[shard] = Policy(self.step(), number, policy.stale_lag_max, oldest)

    def recovered(self, shard: ShardId, found: EpochsOfModel) -> None:
        """Raises Broken when a shard came back with less than it answered for."""
        kept = self.durable.get(shard, Policy(0))
        if found.oldest < kept.oldest or found.current < kept.current:
            raise Broken(f"{shard} answered for {kept}, and came back with {found}")
        lags = self.asked[shard] | {(epoch.number, 0) for epoch in found.registered} | {(0, 0)}
        if (found.current, found.stale_lag_max) not in lags:
            raise Broken(f"{shard} came back with {found}, it was only asked for {lags}")
        policy = Policy(self.step(), found.current, found.stale_lag_max, found.oldest)
        self.policies[shard].append(policy)

    def in_force(self, shard: ShardId, began: int, ended: int) -> list[Policy]:
        """Every policy of the shard at any moment between two steps."""
        policies = self.policies[shard]
        before = [policy for policy in policies if policy.since <= began]
        return before[-1:] + [policy for policy in policies if began < policy.since <= ended]

    def may_be_deleted(
        self, shards: set[ShardId], namespace: NamespaceId, keys: list[BlockKey], epoch: int, since: int
    ) -> bool:
        """Was any of this purged, or its epoch dropped, after a step?"""
        purged = any(
            purge.covers(namespace, key, epoch) for purge in self.purges if purge.step > since for key in keys
        )
        return purged or any(self.policies[shard][-1].oldest > epoch for shard in shards)


class SlowUpkeep(Upkeep):
    async def _sweep(self) -> int:
        """A few slots at a time, and time passes: much may happen before what is dead is freed."""
        left = self._core.sweep(SWEEP_SLOTS)
        self.settle()
        await asyncio.sleep(0.01 if left else 0.0)
        return left


class WitnessedDriver(ShardDriver):
    def __init__(
        self,
        config: DriverConfig,
        storage: TierStorage,
        clock: Clock,
        witness: Witness,
        durable: DurableTier | None = None,
    ) -> None:
        super().__init__(config, storage, clock, durable)
        self._witness = witness
        self._watchers = Watchers(self.core, WATCH_BATCH)
        parts = config, self.core, self.tiers, self._notes, clock, self._watchers, self._move
        self._upkeep = SlowUpkeep(*parts)
        if durable is not None:
            encode = None if config.encode_frame is None else self._encoded
            moving = self.core, self.tiers, durable, clock, self._settle
            self.mover = Mover(*moving, encode, batch_nbytes=MOVED_FRAMES * FRAME_NBYTES)
        witness.born(config.shard)

    async def recover(self) -> None:
        await super().recover()
        if self.mover is not None:
            for row in self.core.index.rows():
                self._appeared(row.namespace, row.key, row.epoch.number)
            self._witness.recovered(self.shard, self.core.epochs.show(SPEC.model_id))

    def _encoded(self, frame: memoryview, layout: KVLayout) -> memoryview | None:
        meta, encode = decode_header(frame).meta, self.config.encode_frame
        self._appeared(meta.namespace, meta.key, meta.epoch.number)
        return None if encode is None else encode(frame, layout)

    def _appeared(self, namespace: NamespaceId, key: BlockKey, epoch: int) -> None:
        self._witness.appeared[self.config.incarnation, namespace, key, epoch].append(self._witness.step())

    async def register_epoch(self, model_id: str, epoch: Epoch, *, timeout_s: float) -> None:
        self._witness.registered(self.shard, epoch.number)
        await super().register_epoch(model_id, epoch, timeout_s=timeout_s)

    async def advance_epoch(
        self, model_id: str, number: int, policy: EpochPolicy = ISOLATE, *, timeout_s: float
    ) -> Revision:
        if number in self.core.epochs.of(model_id).bound:  # in force at once, durable when it is answered
            self._witness.advanced(self.shard, number, policy)
            self._witness.asked[self.shard].add((number, policy.stale_lag_max))
        took_effect = number >= self.core.epochs.of(model_id).current  # else a newer one stands already
        revision = await super().advance_epoch(model_id, number, policy, timeout_s=timeout_s)
        if self.mover is not None and took_effect:
            self._witness.kept(self.shard, number, policy)
        return revision

    async def purge(self, scope: Purge, *, timeout_s: float) -> Purged:
        self.core.namespace(scope.namespace)  # a purge that is refused purges nothing
        self._witness.purges.append(ServedPurge(self._witness.step(), self.config.incarnation, scope))
        return await super().purge(scope, timeout_s=timeout_s)

    async def begin(self, *asked: Any, timeout_s: float) -> TxnOpened:
        opened = await super().begin(*asked, timeout_s=timeout_s)
        owner: str = asked[4]
        self._witness.begun[self.shard, int(owner.rpartition("#")[2])] = self._witness.step()
        self.check_quotas(self.config.quotas)
        return opened

    def check_quotas(self, quotas: Mapping[str, int]) -> None:
        """No tenant ever holds more than its share of the host. Counted from slots, not from accounts."""
        table, spaces = self.core.index.versions, self.core.index.by_index
        for tenant, quota in quotas.items():
            mine = {space.index for space in spaces if space.namespace.tenant == tenant}
            used = sum(
                nbytes
                for space, state, lies, nbytes in zip(
                    table.spaces, table.states, table.residences, table.nbytes, strict=True
                )
                if state and space in mine and lies & (ON_HOST | TO_HOST)
            )
            if used > quota:
                raise Broken(f"{tenant} holds {used} bytes on {self.shard}, its quota is {quota}")
