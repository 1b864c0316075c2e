"""What clients asked each shard and were answered: noted on the way, judged at once or at the end.

At once: every version matched is of an epoch that some policy in force during the call allowed; nothing is
answered below an acknowledged compaction; a commit answers each of its offers by name. At the end: every
register (linearizability.py) is linearizable.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    BlockRef,
    EpochPolicy,
    Incarnation,
    LeaseId,
    MissReason,
    NamespaceId,
    Refusal,
    Revision,
    ShardId,
    Snapshot,
    TxnId,
)
from kvstore.transport.base import BlockOffer, CommitResult, MatchResult, Purge, Purged, TxnOpened
from kvstore.transport.sim import SimNetwork, SimTransport
from kvstore.transport.sim_host import SimHost
from tests.sim.linearizability import Kind, Op, is_linearizable
from tests.sim.witness import Witness, covers
from tests.sim.writings import Broken

SURE = 0.9  # of a lease: clocks differ by less
SAW_NOTHING = {
    MissReason.ABSENT,
    MissReason.OTHER_EPOCH,
    MissReason.LOW_QUALITY,
    MissReason.DROPPED_EPOCH,
    MissReason.NOT_YET,
}

Name = tuple[ShardId, NamespaceId, BlockKey, int]  # of a register, on any incarnation of its shard


class NotLinearizable(Broken):
    pass


@dataclass(slots=True)
class Call:
    invoked: int
    asked_s: float
    horizons: dict[Incarnation, int]  # acknowledged by then


@dataclass(slots=True)
class Pin:
    """Somebody was told at step `told` that a version is held, and until when that is certain."""

    told: int
    sure_until: float
    ended: float = inf  # the step its release was asked for at

    def covers(self, op: Op) -> bool:
        return self.told <= op.invoked and op.ended_s < self.sure_until and op.returned < self.ended


@dataclass(slots=True)
class OpenTxn:
    call: Call
    told: int
    namespace: NamespaceId
    epoch: int
    quality: int
    lease_s: float
    keys: list[BlockKey]
    outcomes: tuple[Refusal | None, ...]


@dataclass(frozen=True, slots=True)
class AckedPurge:
    shard: ShardId
    scope: Purge
    served: int
    acked: int


@dataclass(slots=True)
class History:
    witness: Witness
    holds: bool  # pins promise something here: no storage gives back what it should not
    registers: dict[tuple[Incarnation, Name], list[Op]] = field(default_factory=lambda: defaultdict(list))
    unknown: dict[Name, list[Op]] = field(default_factory=lambda: defaultdict(list))
    scopes: list[tuple[ShardId, Incarnation | None, Purge, Op]] = field(default_factory=list)
    drops: list[tuple[ShardId, int, Op]] = field(default_factory=list)
    purges: list[AckedPurge] = field(default_factory=list)
    horizons: dict[Incarnation, int] = field(default_factory=dict)  # acknowledged
    pins: dict[BlockRef, list[Pin]] = field(default_factory=lambda: defaultdict(list))
    leases: dict[tuple[ShardId, LeaseId], list[Pin]] = field(default_factory=dict)
    committed: dict[tuple[ShardId, TxnId], LeaseId] = field(default_factory=dict)
    txns: dict[tuple[ShardId, TxnId], OpenTxn] = field(default_factory=dict)
    qualities: dict[BlockRef, int] = field(default_factory=dict)

    def call(self) -> Call:
        return Call(self.witness.step(), asyncio.get_running_loop().time(), dict(self.horizons))

    def op(self, kind: Kind, call: Call, version: BlockRef | None = None, least: int = 0) -> Op:
        """An operation that returns now."""
        ended_s = asyncio.get_running_loop().time()
        return Op(kind, call.invoked, self.witness.step(), ended_s, version, least)

    # -- noted -------------------------------------------------------------------------------------

    def matched(
        self, shard: ShardId, call: Call, snapshot: Snapshot, keys: Sequence[BlockKey], lease_s: float,
        answer: MatchResult,
    ) -> None:  # fmt: skip
        self._judge(shard, call, snapshot, answer)
        blocks = answer.pinned(shard, keys)
        seen = [(b.key, b.epoch.number, b.ref) for b in blocks]
        if answer.lease is not None:
            self._hold(shard, answer.lease, (b.ref for b in blocks), call, lease_s)
        for block in blocks:
            self._told_quality(block.ref, int(block.quality))
        if snapshot.revision is not None:
            return  # what stood there then: no register
        op = self.op(Kind.READ, call, None, int(snapshot.min_quality))
        for key, epoch, ref in seen:
            name = shard, snapshot.namespace, key, epoch
            saw = Op(op.kind, op.invoked, op.returned, op.ended_s, ref)
            self.registers[answer.revision.incarnation, name].append(saw)
        if len(blocks) < len(keys) and answer.miss in SAW_NOTHING:
            name = shard, snapshot.namespace, keys[len(blocks)], snapshot.epoch.number
            self.registers[answer.revision.incarnation, name].append(op)

    def committed_as(
        self, shard: ShardId, call: Call, txn: OpenTxn, answer: CommitResult, pin_for_s: float | None
    ) -> None:
        if len(answer.blocks) != len(txn.keys):
            raise Broken(f"{len(txn.keys)} blocks were offered, {len(answer.blocks)} are answered for")
        op = self.op(Kind.WRITE, call)
        held = []
        for key, outcome, block in zip(txn.keys, txn.outcomes, answer.blocks, strict=True):
            if isinstance(block, Refusal):
                if outcome not in (None, Refusal.EXISTS, block):
                    raise Broken(f"refused as {outcome} at begin, as {block} at commit")
                since, deleted = txn.call.invoked, self.witness.may_be_deleted
                lost = outcome is Refusal.EXISTS or block is Refusal.PURGED
                if lost and self.holds and not deleted({shard}, txn.namespace, [key], txn.epoch, since):
                    raise Broken(f"answered {outcome} at begin, {block} at commit: nobody deleted it")
                continue
            if outcome not in (None, Refusal.EXISTS):
                raise Broken(f"refused as {outcome}, and yet committed")
            self._told_quality(block, txn.quality)
            held.append(block)
            if outcome is None:
                saw = Op(Kind.WRITE, op.invoked, op.returned, op.ended_s, block)
            else:  # it was there when the transaction began, and held for it until now
                saw = Op(Kind.READ, txn.call.invoked, txn.told, txn.call.asked_s, block)
                sure_until = txn.call.asked_s + SURE * txn.lease_s
                self.pins[block].append(Pin(txn.told, sure_until, call.invoked))
            self.registers[block.incarnation, (shard, txn.namespace, key, txn.epoch)].append(saw)
        if answer.lease is not None and pin_for_s is not None:
            self._hold(shard, answer.lease, held, call, pin_for_s)

    def may_have_committed(self, shard: ShardId, call: Call, txn: OpenTxn) -> None:
        for key, outcome in zip(txn.keys, txn.outcomes, strict=True):
            if outcome is None:
                self.unknown[shard, txn.namespace, key, txn.epoch].append(Op(Kind.WRITE, call.invoked, inf))

    def purged(self, shard: ShardId, call: Call, scope: Purge, answer: Purged) -> None:
        incarnation = answer.revision.incarnation
        served = next(
            p.step for p in self.witness.purges if p.scope is scope and p.incarnation == incarnation
        )
        op = self.op(Kind.PURGE, call)
        self.purges.append(AckedPurge(shard, scope, served, self.witness.step()))
        self.scopes.append((shard, incarnation, scope, op))

    def released(self, shard: ShardId, leases: Iterable[LeaseId]) -> None:
        step = self.witness.step()
        for lease in leases:
            for pin in self.leases.get((shard, lease), ()):
                pin.ended = min(pin.ended, step)

    def renewed(self, shard: ShardId, call: Call, leases: Sequence[LeaseId], lease_s: float) -> None:
        for lease in leases:
            for pin in self.leases.get((shard, lease), ()):
                pin.sure_until = max(pin.sure_until, call.asked_s + SURE * lease_s)

    # -- judged ------------------------------------------------------------------------------------

    def check(self) -> int:
        """Every register. Raises NotLinearizable. How many operations there were."""
        for (incarnation, name), ops in self.registers.items():
            shard, namespace, key, epoch = name
            every = ops + self.unknown.get(name, [])
            for where, life, scope, op in self.scopes:
                if where == shard and life in (None, incarnation) and covers(scope, namespace, key, epoch):
                    every.append(op)
            every += [op for where, number, op in self.drops if where == shard and epoch < number]
            appeared = self.witness.appeared.get((incarnation, namespace, key, epoch), ())
            every += [Op(Kind.WRITE, step, inf) for step in appeared]
            if not is_linearizable(every, self._is_held, self.qualities):
                told = "\n".join(map(str, sorted(every, key=lambda op: op.invoked)))
                raise NotLinearizable(f"{key.hex()[:8]} at epoch {epoch} on {shard}:\n{told}")
        return sum(map(len, self.registers.values()))

    def _is_held(self, ref: BlockRef, op: Op) -> bool:
        return self.holds and any(pin.covers(op) for pin in self.pins.get(ref, ()))

    def _judge(self, shard: ShardId, call: Call, snapshot: Snapshot, answer: MatchResult) -> None:
        if not len(answer):
            return
        own, at = snapshot.epoch.number, snapshot.revision
        policies = self.witness.in_force(shard, call.invoked, self.witness.step())
        for epoch in answer.epochs:
            if not any(policy.allows(own, epoch.number, snapshot.stale_lag_max) for policy in policies):
                raise Broken(f"epoch {own} was shown KV of epoch {epoch.number} under {policies}")
        horizon = 0 if at is None else call.horizons.get(at.incarnation, 0)
        if at is not None and at.counter < horizon:
            raise Broken(f"a hit at {at}, compacted up to {horizon}")

    def _hold(
        self, shard: ShardId, lease: LeaseId, refs: Iterable[BlockRef], call: Call, lease_s: float
    ) -> None:
        told = self.witness.step()
        pin = Pin(told, call.asked_s + SURE * lease_s)
        self.leases[shard, lease] = [pin]
        for ref in refs:
            self.pins[ref].append(pin)

    def _told_quality(self, ref: BlockRef, quality: int) -> None:
        self.qualities[ref] = max(quality, self.qualities.get(ref, 0))


class NotingTransport(SimTransport):
    """A transport that notes what goes over it."""

    def __init__(self, host: SimHost, network: SimNetwork, history: History) -> None:
        super().__init__(host, network)
        self._history = history

    async def match(
        self, snapshot: Snapshot, keys: Sequence[Any], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult:
        history, call = self._history, self._history.call()
        answer = await super().match(snapshot, keys, owner, lease_s, timeout_s=timeout_s)
        history.matched(self.shard, call, snapshot, keys, lease_s, answer)
        return answer

    async def begin(
        self, namespace: NamespaceId, epoch: Any, quality: Any, offers: Sequence[BlockOffer], owner: str,
        lease_s: float, request_id: bytes, *, timeout_s: float,
    ) -> TxnOpened:  # fmt: skip
        history, call = self._history, self._history.call()
        opened = await super().begin(
            namespace, epoch, quality, offers, owner, lease_s, request_id, timeout_s=timeout_s
        )
        history.txns[self.shard, opened.txn] = OpenTxn(
            call, history.witness.step(), namespace, epoch.number, int(quality), lease_s,
            [offer.key for offer in offers], opened.outcomes,
        )  # fmt: skip
        return opened

    async def commit(self, txn: TxnId, pin_for_s: float | None, *, timeout_s: float) -> CommitResult:
        history, call = self._history, self._history.call()
        opened = history.txns[self.shard, txn]
        try:
            answer = await super().commit(txn, pin_for_s, timeout_s=timeout_s)
        except BaseException:
            history.may_have_committed(self.shard, call, opened)
            raise
        history.committed_as(self.shard, call, opened, answer, pin_for_s)
        if answer.lease is not None:
            history.committed[self.shard, txn] = answer.lease
        return answer

    async def abort(self, txn: TxnId, *, timeout_s: float) -> None:
        lease = self._history.committed.get((self.shard, txn))
        if lease is not None:
            self._history.released(self.shard, [lease])
        await super().abort(txn, timeout_s=timeout_s)

    async def renew(self, leases: Sequence[LeaseId], lease_s: float, *, timeout_s: float) -> list[bool]:
        call = self._history.call()
        held = await super().renew(leases, lease_s, timeout_s=timeout_s)
        self._history.renewed(
            self.shard, call, [lease for lease, is_held in zip(leases, held, strict=True) if is_held], lease_s
        )
        return held

    async def release(self, leases: Sequence[LeaseId], *, timeout_s: float) -> None:
        self._history.released(self.shard, leases)
        await super().release(leases, timeout_s=timeout_s)

    async def purge(self, scope: Purge, *, timeout_s: float) -> Purged:
        """What comes twice, or whose answer is lost, may happen once more at any later time."""
        history, call = self._history, self._history.call()
        history.scopes.append((self.shard, None, scope, Op(Kind.DROP, call.invoked, inf)))
        answer = await super().purge(scope, timeout_s=timeout_s)
        history.purged(self.shard, call, scope, answer)
        return answer

    async def compact(self, revision: Revision, *, timeout_s: float) -> Revision:
        horizon = await super().compact(revision, timeout_s=timeout_s)
        known = self._history.horizons
        known[horizon.incarnation] = max(horizon.counter, known.get(horizon.incarnation, 0))
        return horizon

    async def advance_epoch(
        self, model_id: str, number: int, policy: EpochPolicy = ISOLATE, *, timeout_s: float
    ) -> Revision:
        if policy.drop_older:
            op = Op(Kind.DROP, self._history.call().invoked, inf)
            self._history.drops.append((self.shard, number, op))
        return await super().advance_epoch(model_id, number, policy, timeout_s=timeout_s)
