"""What reached the shards, in one order: what a history's answers are judged by, or excused with.

A client knows when it asked and when it was answered; what happened in between, or because a message came
twice or long after its caller gave up, only the shard can tell. Requests are noted here as they are served.
Nothing is taken from what the shard answers: what follows from a request is worked out here, once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.clock import Clock
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.nouns import ISOLATE, BlockKey, Epoch, EpochPolicy, Incarnation, NamespaceId, Revision, ShardId
from kvstore.tiers.base import TierStorage
from kvstore.transport.base import Purge, Purged, TxnOpened
from kvstore.upkeep import Upkeep
from kvstore.watching import Watchers
from tests.sim.writings import Broken

SWEEP_SLOTS = 3
WATCH_BATCH = 4  # changes: small, so that revisions do not fit and streams are long


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
    begun: dict[tuple[Incarnation, int], int] = field(default_factory=dict)
    """Where and when a writing was last offered, by its number."""

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
    def __init__(self, config: DriverConfig, storage: TierStorage, clock: Clock, witness: Witness) -> None:
        super().__init__(config, storage, clock)
        self._watchers = Watchers(self.core, WATCH_BATCH)
        self._upkeep = SlowUpkeep(config, self.core, self.tiers, self._notes, clock, self._watchers)
        self._witness = witness
        witness.born(config.shard)

    async def register_epoch(self, model_id: str, epoch: Epoch, *, timeout_s: float) -> None:
        await super().register_epoch(model_id, epoch, timeout_s=timeout_s)
        self._witness.registered(self.shard, epoch.number)

    async def advance_epoch(
        self, model_id: str, number: int, policy: EpochPolicy = ISOLATE, *, timeout_s: float
    ) -> Revision:
        revision = await super().advance_epoch(model_id, number, policy, timeout_s=timeout_s)
        self._witness.advanced(self.shard, number, policy)
        return revision

    async def purge(self, scope: Purge, *, timeout_s: float) -> Purged:
        self.core.namespace(scope.namespace)  # a purge that is refused purges nothing
        self._witness.purges.append(ServedPurge(self._witness.step(), self.config.incarnation, scope))
        return await super().purge(scope, timeout_s=timeout_s)

    async def begin(self, *asked: Any, timeout_s: float) -> TxnOpened:
        opened = await super().begin(*asked, timeout_s=timeout_s)
        owner: str = asked[4]
        self._witness.begun[self.config.incarnation, int(owner.rpartition("#")[2])] = self._witness.step()
        self.check_quotas(self.config.quotas)
        return opened

    def check_quotas(self, quotas: Mapping[str, int]) -> None:
        """No tenant ever holds more than its share. Counted from the slots, not from the accounts."""
        table, spaces = self.core.index.versions, self.core.index.by_index
        for tenant, quota in quotas.items():
            mine = {space.index for space in spaces if space.namespace.tenant == tenant}
            used = sum(
                nbytes
                for space, state, nbytes in zip(table.spaces, table.states, table.nbytes, strict=True)
                if state and space in mine
            )
            if used > quota:
                raise Broken(f"{tenant} holds {used} bytes on {self.shard}, its quota is {quota}")
