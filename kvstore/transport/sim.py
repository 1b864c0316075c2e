"""A network and its hosts in one process, in virtual time: the transport that the proofs run on.

Everything random comes from one seeded generator and time passes only when nothing can run, so a seed
gives the same history every time, a minute of it in milliseconds. What can go wrong on each message is in
`Faults`; what did is counted by (fault, call), so that a proof can say what it has met.

    client -> request: delayed, lost, sent twice -> host: paused, crashed -> driver -> answer: delayed, lost

A call may be cut off by a crash before it is served, in the middle, and after it has taken effect.

A host keeps its own time: monotonic, at a rate and an offset that are its own. A pause stops everything on
it while time goes on, as SIGSTOP does. A crash forgets everything and comes back as another incarnation.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kvstore.driver import ShardDriver
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.nouns import (
    BlockRef,
    Epoch,
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
    BlockOffer,
    CommitResult,
    MatchResult,
    ReadItem,
    ShardHello,
    ShardStatus,
    TxnOpened,
)

Answer = TypeVar("Answer")

_TICK_S: Final = 0.5
_ITEMS_A_MESSAGE: Final = 3


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing is ready. For one process alone."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_NoWaiting(self))

    def time(self) -> float:
        return self._now

    def pass_time(self, seconds: float) -> None:
        self._now += seconds


class _NoWaiting(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("every task waits for ever: the simulated world has come to a halt")
        self._loop.pass_time(timeout)
        return []  # nothing here ever comes from outside


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances, for each message, and the delay it takes at most, in seconds."""

    delay_s: float = 0.01
    lose: float = 0.0  # the request, or the answer
    twice: float = 0.0
    linger: float = 0.5  # the host goes on with a call its caller gave up


class SimClock:
    """A host's own monotonic time."""

    def __init__(self, rate: float, offset: float) -> None:
        self._rate = rate
        self._offset = offset

    def now(self) -> float:
        return asyncio.get_running_loop().time() * self._rate + self._offset


class SimHost:
    """A place for one shard. `make` gives a driver for each of its lives."""

    def __init__(self, shard: ShardId, make: Callable[[SimHost], ShardDriver], clock: SimClock) -> None:
        self.shard = shard
        self.clock = clock
        self.crashes = 0
        self._make = make
        self._awake = asyncio.Event()
        self._awake.set()
        self._calls: set[asyncio.Task[Any]] = set()
        self.driver = make(self)
        self._reaper = asyncio.create_task(self._reap_forever())

    async def awake(self) -> None:
        await self._awake.wait()

    def pause(self) -> None:
        self._awake.clear()

    def resume(self) -> None:
        self._awake.set()

    def crash(self) -> None:
        """Lose everything; be back at once as another incarnation."""
        self.crashes += 1
        for call in self._calls:
            call.cancel()
        self.driver = self._make(self)

    def run(
        self, call: Callable[[ShardDriver], Awaitable[Answer]], before_s: float, after_s: float
    ) -> asyncio.Task[Answer]:
        """Serve a call that waited for its turn; its answer too takes time to leave the host."""

        async def served() -> Answer:
            await asyncio.sleep(before_s)
            await self.awake()
            answer = await call(self.driver)
            await asyncio.sleep(after_s)
            return answer

        task = asyncio.create_task(served())
        self._calls.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        self.resume()
        self._reaper.cancel()
        await asyncio.gather(self._reaper, *self._calls, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # whoever called may have gone

    async def _reap_forever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            await self.awake()
            self.driver.reap()


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

    async def advance_epoch(self, model_id: str, number: int, *, timeout_s: float) -> Revision:
        return await self._call(
            "advance", lambda d: d.advance_epoch(model_id, number, timeout_s=timeout_s), timeout_s
        )

    async def match(
        self, snapshot: Snapshot, keys: Sequence[Any], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult:
        return await self._call(
            "match", lambda d: d.match(snapshot, keys, owner, lease_s, timeout_s=timeout_s), timeout_s
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
                    self._host.run(call, *network.times())
                served = self._host.run(call, *network.times())
                answer = await asyncio.shield(served)
                await network.carry("answer", step)
                return answer
        except TimeoutError:
            self._give_up(served, step)
            raise DeadlineExceeded(f"{step} on {self.shard} took longer than {timeout_s:.3f} s") from None
        except asyncio.CancelledError:
            if served is not None and served.cancelled():
                network.met["crash", step] += 1
                raise Unavailable(f"shard {self.shard} broke off {step}") from None
            self._give_up(served, step)
            raise

    def _give_up(self, served: asyncio.Task[Any] | None, step: str) -> None:
        lingers = self._network.chance("late", step, self._network.faults.linger)
        if served is not None and not lingers:
            served.cancel()
