"""Keeps what runs equal to what is configured: so many shards, prefill and decode workers, always.

    wanted   --launch-->  running  --no answer, or dead-->  waiting (backoff)  --launch--> running
                             |
                             +-- told to the orchestrator (workers), to everybody (a shard's new address)

A *place* is one wanted process ("decode-0"); what runs in it has an incarnation number in its id
("decode-0.2"), so that nothing said about a dead one is taken for its successor. A shard keeps its id over
restarts: placement hashes it. A dead shard stays in the topology under its old address until it is back:
its keys are misses meanwhile, and no other shard's keys move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from engine.errors import RanksLost
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import KVStrataError
from kvstore.nouns import Epoch, ShardId
from kvstore.topology import ShardEntry, Topology
from router.errors import StartFailed, WorkerError, WorkerFailed, WorkerGone, WorkerSlow
from router.fleet import Member
from router.launcher import Kind, LaunchedShard, LaunchedWorker, Launcher
from router.metrics import RouterMetrics
from router.orchestrator import Orchestrator

__all__ = ["Place", "Supervision", "Supervisor", "within"]

T = TypeVar("T")
_SETTLED_S: Final = 60.0
"""After so long a life a place's next death is a new story: its backoff begins anew."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Supervision:
    """How many of each, and every bound. Seconds."""

    shards: int
    prefill: int
    decode: int
    start_s: float = 300.0
    ping_interval_s: float = 2.0
    ping_s: float = 10.0
    pings_missed_max: int = 3
    restart_delay_s: float = 0.5
    restart_delay_s_max: float = 30.0


@dataclass(slots=True, eq=False)
class Place:
    """One wanted process and what runs there now."""

    kind: Kind
    name: str
    running: LaunchedShard | LaunchedWorker | None = None
    incarnation: int = 0
    failures: int = 0  # in a row, of starting or of staying alive
    missed: int = 0  # pings in a row
    since: float = 0.0  # when it came up, or when it may be tried again
    why_down: str = "not started yet"
    launching: asyncio.Task[None] | None = None
    topology_version: int = 0  # that what runs here was told last

    @property
    def worker_id(self) -> str:
        return f"{self.name}.{self.incarnation}"


class Supervisor:
    """Lives on one event loop. `told` gets one line per step of the start."""

    def __init__(
        self,
        plan: Supervision,
        launcher: Launcher,
        orchestrator: Orchestrator,
        metrics: RouterMetrics,
        *,
        told: Callable[[str], None],
        clock: Clock | None = None,
        shards_changed: Callable[[Mapping[str, LaunchedShard]], None] | None = None,
    ) -> None:
        """`shards_changed` hears where all shards are, by name, whenever one came up."""
        self.topology = Topology(1, ())
        self._shards_changed = shards_changed
        self.places = [
            Place(kind, f"{kind.value}-{number}")
            for kind, count in (
                (Kind.SHARD, plan.shards),
                (Kind.PREFILL, plan.prefill),
                (Kind.DECODE, plan.decode),
            )
            for number in range(count)
        ]
        self._plan = plan
        self._launcher = launcher
        self._orchestrator = orchestrator
        self._metrics = metrics
        self._told = told
        self._clock = clock or MonotonicClock()
        self._weights: Epoch | None = None  # None: those it was configured with
        self._wake = asyncio.Event()

    # -- starting and ending -----------------------------------------------------------------------

    async def start(self) -> None:
        """Bring everything up, all at once. Raises StartFailed (or the ModelError, ConfigError ...) of the
        first that could not; then all that was started is killed."""
        for kind in Kind:
            places = self._of(kind)
            for number, place in enumerate(places, 1):
                self._told(f"starting {_title(kind)} {number}/{len(places)}")
                place.launching = asyncio.create_task(self._launch(place), name=f"launch {place.name}")
        tasks = [place.launching for place in self.places if place.launching is not None]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            await _cancelled(tasks)
            self._kill_all()
            raise

    async def run(self) -> None:
        """Reconcile until cancelled: every `ping_interval_s`, and at once when a worker is reported gone. A
        pass that fails is logged, and the next one comes."""
        while True:
            try:
                await self.check()
            except Exception:
                log.exception("a pass of the supervisor failed")
            try:
                async with asyncio.timeout(self._plan.ping_interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            finally:
                self._wake.clear()

    def report_gone(self, worker_id: str) -> None:
        """The orchestrator has lost a worker: look at once."""
        for place in self.places:
            if place.running is not None and place.worker_id == worker_id:
                place.missed = self._plan.pings_missed_max
        self._wake.set()

    def serve_weights(self, path: str, epoch: Epoch) -> None:
        """Who is launched from now on has these. One that comes up with others is launched again."""
        self._weights = epoch
        self._launcher.serve_weights(path, epoch.number)

    async def replace(self, place: Place, running: LaunchedWorker, why: str) -> None:
        """Take it down, if it still runs there; it comes back by itself."""
        if place.running is running:
            await self._take_down(place, why)
            self._wake.set()

    async def stop(self, drain_s: float) -> None:
        """Let running requests finish within `drain_s`, then end every process."""
        await _cancelled([place.launching for place in self.places if place.launching is not None])
        if drain_s > 0:
            drains = [p.running.process.drain(drain_s) for p in self._workers() if p.running is not None]
            await asyncio.gather(*(within(d, drain_s + 1) for d in drains), return_exceptions=True)
        self._kill_all()

    # -- reconciling -------------------------------------------------------------------------------

    async def check(self) -> None:
        """One pass: ask everybody, tell who missed a topology, replace who is dead. Launches go on in the
        background."""
        alive = [place for place in self.places if place.running is not None]
        answers = await asyncio.gather(*(self._visit(place) for place in alive))
        for place, failure in zip(alive, answers, strict=True):
            if failure is None and place.missed < self._plan.pings_missed_max:
                place.missed = 0
                continue
            place.missed += 1
            if isinstance(failure, WorkerGone) or place.missed >= self._plan.pings_missed_max:
                await self._take_down(place, str(failure or "its poll broke off"))
        for place in self.places:
            idle = place.launching is None or place.launching.done()
            if place.running is None and idle and self._clock.now() >= place.since:
                place.launching = asyncio.create_task(self._relaunch(place), name=f"relaunch {place.name}")

    async def gather(self, timeout_s: float) -> None:
        """Bring the totals up to date; who does not answer in time is left out."""
        alive = [place for place in self.places if place.running is not None]
        await asyncio.gather(*(self._ping(place, timeout_s) for place in alive))

    async def _visit(self, place: Place) -> WorkerError | None:
        failure = await self._ping(place)
        if failure is None:
            await self._tell_topology(place)
        return failure

    async def _ping(self, place: Place, timeout_s: float | None = None) -> WorkerError | None:
        """Ask for counters, which shows that it lives. Why it did not answer, or None."""
        running, limit_s = place.running, timeout_s or self._plan.ping_s
        try:
            if isinstance(running, LaunchedShard):
                status = await within(running.process.status(), limit_s)
                if place.running is running:
                    self._metrics.totals.saw_shard(status)
            elif isinstance(running, LaunchedWorker):
                counters = await within(running.process.counters(), limit_s)
                if place.running is running:  # else it has been forgotten, and would count twice
                    self._metrics.totals.fold(running.facts.worker_id, counters)
        except WorkerError as error:
            return error
        except RanksLost as error:
            return WorkerGone(f"{place.name} computes no more: {error}")
        except KVStrataError as error:
            log.warning("ping was refused", place=place.name, error=str(error))
        except Exception as error:
            log.exception("ping failed", place=place.name)
            return WorkerFailed(f"{place.name} answered nonsense: {type(error).__name__}: {error}")
        return None

    async def _tell_topology(self, place: Place) -> None:
        """Where it has an older one. Who does not take it is told again by the next pass."""
        running, topology = place.running, self.topology
        if running is None or place.topology_version >= topology.version:
            return
        try:
            await within(running.process.set_topology(topology), self._plan.ping_s)
        except Exception as error:
            log.warning("could not tell the topology", place=place.name, error=str(error))
            return
        if place.running is running:
            place.topology_version = max(place.topology_version, topology.version)

    async def _take_down(self, place: Place, why: str) -> None:
        running, place.running = place.running, None
        if running is None:
            return
        log.warning("replacing a process", place=place.name, why=why)
        settled = self._clock.now() - place.since > _SETTLED_S
        place.failures = 1 if settled else place.failures + 1
        place.missed, place.why_down = 0, why
        place.since = self._clock.now() + self._delay(place)
        running.process.kill()
        if isinstance(running, LaunchedWorker):
            await self._orchestrator.remove(running.facts.worker_id, why)
            self._metrics.totals.forget(running.facts.worker_id)
        self._metrics.worker_restarts.labels(place.kind.value).inc()

    async def _relaunch(self, place: Place) -> None:
        """As _launch, but a failure is only the next reason to wait."""
        try:
            await self._launch(place)
        except Exception as error:
            place.failures += 1
            place.why_down = str(error)
            place.since = self._clock.now() + self._delay(place)
            log.warning("could not bring back", place=place.name, error=str(error))

    def _delay(self, place: Place) -> float:
        """Exponential from `restart_delay_s`, bounded."""
        doubled = self._plan.restart_delay_s * 2.0 ** min(place.failures - 1, 16)
        return min(doubled, self._plan.restart_delay_s_max)

    # -- launching ---------------------------------------------------------------------------------

    async def _launch(self, place: Place) -> None:
        """One start, from nothing to serving."""
        place.incarnation += 1
        began = self._clock.now()
        try:
            if place.kind is Kind.SHARD:
                await self._launch_shard(place)
            else:
                await self._launch_worker(place)
        except WorkerError as error:
            raise StartFailed(f"{place.name} did not come up: {error}") from error
        place.since = self._clock.now()
        self._told(f"{place.name} is up ({place.since - began:.1f} s)")

    async def _launch_shard(self, place: Place) -> None:
        shard = ShardId(place.name)
        launched = await within(self._launcher.shard(shard), self._plan.start_s)
        place.running, place.topology_version = launched, 0
        others = tuple(entry for entry in self.topology.shards if entry.shard != shard)
        entries = sorted((*others, ShardEntry(shard, launched.address)), key=lambda entry: entry.shard)
        self.topology = Topology(self.topology.version + 1, tuple(entries))
        if self._shards_changed is not None:
            running = {p.name: p.running for p in self._of(Kind.SHARD)}
            self._shards_changed({n: r for n, r in running.items() if isinstance(r, LaunchedShard)})
        await asyncio.gather(*(self._tell_topology(place) for place in self.places))

    async def _launch_worker(self, place: Place) -> None:
        launched = await within(self._launcher.worker(place.kind, place.worker_id), self._plan.start_s)
        try:
            await asyncio.gather(*(p.launching for p in self._of(Kind.SHARD) if p.launching is not None))
            topology = self.topology  # a shard may come back while the worker is told: see _visit
            await within(launched.process.set_topology(topology), self._plan.ping_s)
            if self._weights not in (None, launched.facts.epoch):
                raise WorkerFailed("the weights changed while it loaded the old ones")
        except BaseException:
            launched.process.kill()
            raise
        place.running, place.topology_version = launched, topology.version
        member: Any = Member(launched.facts, launched.handle)
        if place.kind is Kind.PREFILL:
            self._orchestrator.add_prefill(member)
        else:
            self._orchestrator.add_decode(member)

    # -- who is there ------------------------------------------------------------------------------

    def _of(self, kind: Kind) -> list[Place]:
        return [place for place in self.places if place.kind is kind]

    def _workers(self) -> list[Place]:
        return [place for place in self.places if place.kind is not Kind.SHARD]

    def _kill_all(self) -> None:
        for place in self.places:
            if place.running is not None:
                place.running.process.kill()
                place.running = None


def _title(kind: Kind) -> str:
    return "shard" if kind is Kind.SHARD else f"{kind.value} worker"


async def within(call: Awaitable[T], limit_s: float) -> T:
    """The call's answer, or WorkerSlow."""
    try:
        async with asyncio.timeout(limit_s):
            return await call
    except TimeoutError:
        raise WorkerSlow(f"no answer within {limit_s:.0f} s") from None


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
