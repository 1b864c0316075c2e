"""A network and its hosts in one process, in virtual time: the transport that the proofs run on.

Everything random comes from one seeded generator and time passes only when nothing can run, so a seed
gives the same history every time, a minute of it in milliseconds. What can go wrong on each message is in
`Faults`; what did is counted by (fault, call), so that a proof can say what it has met.

    client -> request: delayed, lost, sent twice -> host: paused, crashed -> driver -> answer: delayed, lost

A call may be cut off by a crash before it is served, in the middle, and after it has taken effect. A watch
is a stream: each batch is a message of its own, and one that is lost ends the stream. Hosts and their time
are in sim_host.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kvstore.driver import ShardDriver
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.nouns import (
    ISOLATE,
    BlockRef,
    Epoch,
    EpochPolicy,
    EpochsOfModel,
    KnownNamespace,
    LeaseId,
    NamespaceId,
    NamespaceSpec,
    Quality,
    Refusal,
    Revision,
    ShardId,
    Snapshot,
    TxnId,
)
from kvstore.transport.base import (
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
from kvstore.transport.sim_host import SimHost

Answer = TypeVar("Answer")

_ITEMS_A_MESSAGE: Final = 3
_BATCHES_AHEAD: Final = 2  # of a watch, sent and not yet read


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances, for each message, and the delay it takes at most, in seconds."""

    delay_s: float = 0.01
    lose: float = 0.0  # the request, or the answer
    twice: float = 0.0
    linger: float = 0.5  # the host goes on with a call its caller gave up


class SimNetwork:
    """What may go wrong between clients and hosts, and what did."""

    def __init__(self, rng: random.Random, faults: Faults) -> None:
        self.rng = rng
        self.faults = faults
        self.met: Counter[tuple[str, str]] = Counter()

    async def carry(self, what: str, step: str) -> None:
        """One message on its way; for ever, if it is lost."""
        if self.chance("lost " + what, step, self.faults.lose):
            await asyncio.Event().wait()
        await asyncio.sleep(self.rng.random() * self.faults.delay_s)

    def times(self) -> tuple[float, float]:
        """Before and after a call is served."""
        longest = self.faults.delay_s
        return self.rng.random() * longest, self.rng.random() * longest

    def chance(self, fault: str, step: str, probability: float) -> bool:
        happens = self.rng.random() < probability
        if happens:
            self.met[fault, step] += 1
        return happens


class SimTransport:
    """`ShardTransport` to one host over the network."""

    def __init__(self, host: SimHost, network: SimNetwork) -> None:
        self._host = host
        self._network = network

    @property
    def shard(self) -> ShardId:
        return self._host.shard

    async def hello(self, *, timeout_s: float) -> ShardHello:
        return await self._call("hello", lambda d: d.hello(timeout_s=timeout_s), timeout_s)

    async def open_namespace(self, spec: NamespaceSpec, tenant: str, *, timeout_s: float) -> NamespaceId:
        return await self._call(
            "open", lambda d: d.open_namespace(spec, tenant, timeout_s=timeout_s), timeout_s
        )

    async def register_epoch(self, model_id: str, epoch: Epoch, *, timeout_s: float) -> None:
        await self._call(
            "register", lambda d: d.register_epoch(model_id, epoch, timeout_s=timeout_s), timeout_s
        )

    async def advance_epoch(
        self, model_id: str, number: int, policy: EpochPolicy = ISOLATE, *, timeout_s: float
    ) -> Revision:
        return await self._call(
            "advance", lambda d: d.advance_epoch(model_id, number, policy, timeout_s=timeout_s), timeout_s
        )

    async def epochs(self, model_id: str, *, timeout_s: float) -> EpochsOfModel:
        return await self._call("epochs", lambda d: d.epochs(model_id, timeout_s=timeout_s), timeout_s)

    async def match(
        self, snapshot: Snapshot, keys: Sequence[Any], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult:
        return await self._call(
            "match", lambda d: d.match(snapshot, keys, owner, lease_s, timeout_s=timeout_s), timeout_s
        )

    async def announce(
        self, snapshot: Snapshot, keys: Sequence[Any], wait_s: float, *, timeout_s: float
    ) -> Announced:
        return await self._call(
            "announce", lambda d: d.announce(snapshot, keys, wait_s, timeout_s=timeout_s), timeout_s
        )

    async def read(
        self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> AsyncIterator[ReadItem]:
        """A few items a message: any of these may be the last that arrives."""
        end = asyncio.get_running_loop().time() + timeout_s
        for start in range(0, len(refs), _ITEMS_A_MESSAGE):
            some = refs[start : start + _ITEMS_A_MESSAGE]
            left = end - asyncio.get_running_loop().time()

            async def serve(
                driver: ShardDriver, some: Sequence[BlockRef] = some, left: float = left
            ) -> list[ReadItem]:
                return [item async for item in driver.read(namespace, some, timeout_s=left)]

            for item in await self._call("read", serve, left):
                yield ReadItem(start + item.index, item.frame, item.miss)

    async def renew(self, leases: Sequence[LeaseId], lease_s: float, *, timeout_s: float) -> list[bool]:
        return await self._call("renew", lambda d: d.renew(leases, lease_s, timeout_s=timeout_s), timeout_s)

    async def release(self, leases: Sequence[LeaseId], *, timeout_s: float) -> None:
        await self._call("release", lambda d: d.release(leases, timeout_s=timeout_s), timeout_s)

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
        return await self._call(
            "begin",
            lambda d: d.begin(
                namespace, epoch, quality, offers, owner, lease_s, request_id, timeout_s=timeout_s
            ),
            timeout_s,
        )

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], *, timeout_s: float
    ) -> list[Refusal | None]:
        return await self._call("write", lambda d: d.write(txn, frames, timeout_s=timeout_s), timeout_s)

    async def commit(self, txn: TxnId, pin_for_s: float | None, *, timeout_s: float) -> CommitResult:
        return await self._call("commit", lambda d: d.commit(txn, pin_for_s, timeout_s=timeout_s), timeout_s)

    async def abort(self, txn: TxnId, *, timeout_s: float) -> None:
        await self._call("abort", lambda d: d.abort(txn, timeout_s=timeout_s), timeout_s)

    async def report(self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float) -> int:
        return await self._call("report", lambda d: d.report(namespace, refs, timeout_s=timeout_s), timeout_s)

    async def listing(
        self, namespace: NamespaceId, at: Revision | None, cursor: int, limit: int, *, timeout_s: float
    ) -> ListPage:
        return await self._call(
            "list", lambda d: d.listing(namespace, at, cursor, limit, timeout_s=timeout_s), timeout_s
        )

    async def watch(
        self, namespaces: Sequence[NamespaceId], after: Revision | None, *, timeout_s: float
    ) -> AsyncIterator[WatchBatch]:
        """In order, as on one connection; whatever breaks it ends it, in an error."""
        network, end = self._network, asyncio.get_running_loop().time() + timeout_s

        async def serve(driver: ShardDriver, sent: asyncio.Queue[WatchBatch] | None) -> None:
            left = end - asyncio.get_running_loop().time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end + network.faults.delay_s):  # whoever read it may have gone
                    async for batch in driver.watch(namespaces, after, timeout_s=left):
                        await self._host.awake()
                        if sent is not None:
                            await sent.put(batch)

        sent: asyncio.Queue[WatchBatch] = asyncio.Queue(_BATCHES_AHEAD)
        network.met["calls", "watch"] += 1
        async with self._bounded("watch", timeout_s):
            await network.carry("request", "watch")
        if network.chance("twice", "watch", network.faults.twice):
            self._host.run("watch", lambda d: serve(d, None), *network.times())
        served = self._host.run("watch", lambda d: serve(d, sent), *network.times())
        try:
            while not (served.done() and sent.empty()):
                batch = await _first_of(sent, served)
                if batch is None:
                    continue
                if network.chance("lost answer", "watch", network.faults.lose):
                    raise Unavailable(f"shard {self.shard} broke off watch")
                await asyncio.sleep(network.rng.random() * network.faults.delay_s)
                yield batch
            if served.cancelled():
                network.met["crash", "watch"] += 1
                raise Unavailable(f"shard {self.shard} broke off watch")
            served.result()
        finally:
            if not served.done():
                self._give_up(served, "watch")

    async def purge(self, scope: Purge, *, timeout_s: float) -> Purged:
        return await self._call("purge", lambda d: d.purge(scope, timeout_s=timeout_s), timeout_s)

    async def compact(self, revision: Revision, *, timeout_s: float) -> Revision:
        return await self._call("compact", lambda d: d.compact(revision, timeout_s=timeout_s), timeout_s)

    async def namespaces(self, *, timeout_s: float) -> tuple[KnownNamespace, ...]:
        return await self._call("namespaces", lambda d: d.namespaces(timeout_s=timeout_s), timeout_s)

    async def status(self, *, timeout_s: float) -> ShardStatus:
        return await self._call("status", lambda d: d.status(timeout_s=timeout_s), timeout_s)

    async def close(self) -> None:
        """There is no connection to close."""

    async def _call(
        self, step: str, call: Callable[[ShardDriver], Awaitable[Answer]], timeout_s: float
    ) -> Answer:
        network, served = self._network, None
        network.met["calls", step] += 1
        try:
            async with asyncio.timeout(timeout_s):
                await network.carry("request", step)
                if network.chance("twice", step, network.faults.twice):
                    self._host.run(step, call, *network.times())
                served = self._host.run(step, call, *network.times())
                answer = await asyncio.shield(served)
                await network.carry("answer", step)
                return answer
        except TimeoutError:
            self._give_up(served, step)
            raise self._too_late(step, timeout_s) from None
        except asyncio.CancelledError:
            if served is not None and served.cancelled():
                network.met["crash", step] += 1
                raise Unavailable(f"shard {self.shard} broke off {step}") from None
            self._give_up(served, step)
            raise

    @contextlib.asynccontextmanager
    async def _bounded(self, step: str, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise self._too_late(step, timeout_s) from None

    def _too_late(self, step: str, timeout_s: float) -> DeadlineExceeded:
        return DeadlineExceeded(f"{step} on {self.shard} took longer than {timeout_s:.3f} s")

    def _give_up(self, served: asyncio.Task[Any] | None, step: str) -> None:
        lingers = self._network.chance("late", step, self._network.faults.linger)
        if served is not None and not lingers:
            served.cancel()


async def _first_of(sent: asyncio.Queue[WatchBatch], served: asyncio.Task[None]) -> WatchBatch | None:
    """The next batch; None when what sends them has ended first."""
    if sent.empty():
        getting = asyncio.create_task(sent.get())
        try:
            await asyncio.wait((getting, served), return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
        finally:
            getting.cancel()
        return None
    return sent.get_nowait()
