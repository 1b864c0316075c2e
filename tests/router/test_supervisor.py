"""Promise of supervision: what runs becomes what is configured again, and nobody is told of the dead."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.errors import ModelNotFound, RanksLost
from engine.types import UpdateMode, WorkerInfo
from kvstore.clock import ManualClock
from kvstore.nouns import Epoch, Incarnation, ShardId
from kvstore.topology import Topology
from kvstore.transport.base import ShardStatus
from router.config import ServiceConfig
from router.errors import StartFailed, WorkerGone, WorkerSlow
from router.launcher import Kind, LaunchedShard, LaunchedWorker
from router.service import RouterService
from router.supervisor import Place, Supervision, Supervisor
from tests.router.fakes import FakeDecode, FakePrefill, FakeService, Script, facts, fake_service
from tests.tiny_model import make_tiny_model


@dataclass
class FakeProcess:
    name: str
    dead: bool = False
    hung: bool = False
    killed: bool = False
    drained: bool = False
    topologies: list[Topology] = field(default_factory=list)
    deaf: int = 0  # topologies it does not hear
    nonsense: bool = False
    ranks_lost: bool = False
    telling: asyncio.Event | None = None  # held up while it is told

    async def set_topology(self, topology: Topology) -> None:
        if self.deaf:
            self.deaf -= 1
            raise WorkerSlow("no answer")
        self.topologies.append(topology)
        if self.telling is not None:
            await self.telling.wait()

    async def drain(self, timeout_s: float) -> None:
        self.drained = True

    def kill(self) -> None:
        self.killed = True

    async def _alive(self) -> None:
        if self.dead:
            raise WorkerGone(f"{self.name} is dead")
        if self.ranks_lost:
            raise RanksLost("rank 1 has ended")
        if self.nonsense:
            raise TypeError("not what was expected")
        if self.hung:
            await asyncio.Event().wait()

    async def counters(self) -> Mapping[str, float]:
        await self._alive()
        return {"verified_blocks": 1.0, "gauge:running": 2.0}

    async def status(self) -> ShardStatus:
        await self._alive()
        return ShardStatus(ShardId(self.name), Incarnation(1), 1, 10, 5, 0, 0, 0, 1, 0, 0.0)

    async def forget_local(self) -> int:
        return 0

    async def flip_stored_byte(self) -> str | None:
        return None

    async def advance_epoch(self, model_id: str, epoch: Epoch) -> None:
        raise AssertionError("nobody changes weights here")

    async def prepare_weights(self, path: str, number: int) -> Epoch:
        raise AssertionError("nobody changes weights here")

    async def discard_weights(self) -> None:
        raise AssertionError("nobody changes weights here")

    async def update_weights(self, path: str, number: int, mode: UpdateMode, timeout_s: float) -> WorkerInfo:
        raise AssertionError("nobody changes weights here")


@dataclass
class FakeLauncher:
    """Ports grow, so that a shard that comes back is elsewhere."""

    script: Script
    made: list[FakeProcess] = field(default_factory=list)
    refuse: Exception | None = None
    telling: asyncio.Event | None = None  # of what is made from now on

    async def shard(self, shard: ShardId) -> LaunchedShard:
        process = self._make(shard)
        return LaunchedShard(process, f"127.0.0.1:{1000 + len(self.made)}", 1)

    async def worker(self, kind: Kind, worker_id: str) -> LaunchedWorker:
        process = self._make(worker_id)
        handle = FakePrefill(self.script) if kind is Kind.PREFILL else FakeDecode(self.script)
        return LaunchedWorker(process, facts(worker_id), handle)

    def serve_weights(self, path: str, number: int) -> None:
        raise AssertionError("nobody changes weights here")

    def _make(self, name: str) -> FakeProcess:
        if self.refuse is not None:
            raise self.refuse
        self.made.append(FakeProcess(name, telling=self.telling))
        return self.made[-1]

    def newest(self, name: str) -> FakeProcess:
        return next(p for p in reversed(self.made) if p.name.startswith(name))


@dataclass
class House:
    service: FakeService
    launcher: FakeLauncher
    supervisor: Supervisor
    clock: ManualClock
    lines: list[str]

    async def settle(self) -> None:
        """Let launches that a check began come to their end."""
        tasks = [p.launching for p in self.supervisor.places if p.launching is not None]
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    def place(self, name: str) -> Place:
        return next(p for p in self.supervisor.places if p.name == name)

    @property
    def workers(self) -> set[str]:
        fleet = self.service.backend.orchestrator.fleet
        return set(fleet.prefill) | set(fleet.decode)


@pytest.fixture
async def house(tmp_path: Path) -> House:
    service = fake_service(tmp_path, prefill=0, decode=0)
    launcher, clock, lines = FakeLauncher(Script([5, 6])), ManualClock(), list[str]()
    supervisor = Supervisor(
        Supervision(shards=2, prefill=1, decode=1, ping_s=0.05, restart_delay_s=1.0),
        launcher,
        service.backend.orchestrator,
        service.backend.metrics,
        told=lines.append,
        clock=clock,
    )
    return House(service, launcher, supervisor, clock, lines)


async def test_start_brings_up_all_and_tells_the_workers_of_every_shard(house: House) -> None:
    await house.supervisor.start()
    assert house.workers == {"prefill-0.1", "decode-0.1"}
    for name in ("prefill-0", "decode-0"):
        newest = house.launcher.newest(name).topologies[-1]
        assert [entry.shard for entry in newest.shards] == ["shard-0", "shard-1"]
    assert "starting shard 1/2" in house.lines
    assert any(line.startswith("decode-0 is up") for line in house.lines)


async def test_a_failed_start_tells_the_reason_and_leaves_nothing(house: House) -> None:
    house.launcher.refuse = ModelNotFound("no model", "get one")
    with pytest.raises(ModelNotFound):
        await house.supervisor.start()
    assert all(process.killed for process in house.launcher.made)


async def test_a_process_that_dies_while_starting_is_a_failed_start(house: House) -> None:
    house.launcher.refuse = WorkerGone("killed")
    with pytest.raises(StartFailed, match="did not come up"):
        await house.supervisor.start()


async def test_a_dead_worker_is_replaced_by_one_with_a_new_id_after_the_delay(house: House) -> None:
    await house.supervisor.start()
    house.launcher.newest("decode-0").dead = True
    await house.supervisor.check()
    assert house.workers == {"prefill-0.1"}
    assert house.place("decode-0").why_down == "decode-0.1 is dead"
    await house.supervisor.check()
    await house.settle()
    assert house.workers == {"prefill-0.1"}  # its delay is not over
    house.clock.advance(1.1)
    await house.supervisor.check()
    await house.settle()
    assert house.workers == {"prefill-0.1", "decode-0.2"}


async def test_a_shard_that_comes_back_elsewhere_is_told_to_all(house: House) -> None:
    await house.supervisor.start()
    before = house.supervisor.topology
    house.launcher.newest("shard-1").dead = True
    await house.supervisor.check()
    assert house.supervisor.topology == before  # its keys are misses; no other key moves
    house.clock.advance(1.1)
    await house.supervisor.check()
    await house.settle()
    after = house.supervisor.topology
    assert after.version > before.version
    assert [entry.shard for entry in after.shards] == ["shard-0", "shard-1"]
    assert after.shards[0] == before.shards[0]
    assert after.shards[1].address != before.shards[1].address
    assert house.launcher.newest("decode-0").topologies[-1] == after


async def lose(house: House, name: str) -> None:
    house.launcher.newest(name).dead = True
    await house.supervisor.check()
    house.clock.advance(1.1)
    await house.supervisor.check()


async def test_who_missed_a_topology_is_told_again(house: House) -> None:
    await house.supervisor.start()
    deaf = house.launcher.newest("prefill-0")
    deaf.deaf = 1
    await lose(house, "shard-1")
    await house.settle()
    assert deaf.topologies[-1] != house.supervisor.topology
    for _ in range(2):
        await house.supervisor.check()
    assert deaf.topologies[-1] == house.supervisor.topology
    assert deaf.topologies.count(house.supervisor.topology) == 1


async def test_a_shard_that_returns_while_a_worker_starts_is_told_to_it(house: House) -> None:
    await house.supervisor.start()
    house.launcher.telling = told = asyncio.Event()
    await lose(house, "decode-0")
    launching = house.place("decode-0").launching
    for _ in range(20):
        await asyncio.sleep(0)
    house.launcher.telling = None
    await lose(house, "shard-0")
    for _ in range(20):
        await asyncio.sleep(0)
    told.set()
    assert launching is not None
    await asyncio.wait_for(launching, 5)
    await house.supervisor.check()
    assert house.launcher.newest("decode-0").topologies[-1] == house.supervisor.topology


async def test_nonsense_counts_as_silence(house: House) -> None:
    await house.supervisor.start()
    house.launcher.newest("prefill-0").nonsense = True
    for _ in range(3):
        assert "prefill-0.1" in house.workers
        await house.supervisor.check()
    assert "prefill-0.1" not in house.workers


async def test_a_worker_that_lost_a_rank_is_replaced(house: House) -> None:
    await house.supervisor.start()
    house.launcher.newest("prefill-0").ranks_lost = True
    await house.supervisor.check()
    assert "prefill-0.1" not in house.workers


async def test_a_pass_that_fails_does_not_end_supervision(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.supervisor.start()
    passes, second = 0, asyncio.Event()

    async def check() -> None:
        nonlocal passes
        passes += 1
        if passes == 1:
            raise TypeError("a bug of ours")
        second.set()

    monkeypatch.setattr(house.supervisor, "check", check)
    running = asyncio.create_task(house.supervisor.run())
    house.supervisor.report_gone("nobody")  # no need to wait for the interval
    await asyncio.wait_for(second.wait(), 5)
    running.cancel()


async def test_counters_of_the_forgotten_are_not_counted_twice(house: House) -> None:
    await house.supervisor.start()
    await house.supervisor.gather(1.0)
    process = house.launcher.newest("decode-0")
    asked, answer = asyncio.Event(), asyncio.Event()

    async def late() -> Mapping[str, float]:
        asked.set()
        await answer.wait()
        return {"verified_blocks": 1.0}

    process.counters = late  # type: ignore[method-assign]
    gathering = asyncio.create_task(house.supervisor.gather(5.0))
    await asked.wait()
    process.dead, process.counters = True, process._alive  # type: ignore[assignment, method-assign]
    await house.supervisor.check()
    answer.set()
    await gathering
    assert house.service.backend.metrics.totals.workers["verified_blocks"] == 2.0


async def test_a_service_whose_supervision_has_ended_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ends(_: Supervisor) -> None:
        raise RuntimeError("the end")

    monkeypatch.setattr(Supervisor, "run", ends)
    make_tiny_model(tmp_path)
    told = list[str]()
    service = RouterService(ServiceConfig(), tmp_path, FakeLauncher(Script([5])), told=told.append)
    await service.bring_up()
    assert service.not_ready() is None
    await asyncio.sleep(0)
    assert "nobody watches" in (service.not_ready() or "")
    await service.close(0.0)


async def test_only_silence_in_a_row_is_taken_for_death(house: House) -> None:
    await house.supervisor.start()
    process = house.launcher.newest("prefill-0")
    process.hung = True
    await house.supervisor.check()
    await house.supervisor.check()
    process.hung = False
    await house.supervisor.check()
    process.hung = True
    await house.supervisor.check()
    await house.supervisor.check()
    assert "prefill-0.1" in house.workers
    await house.supervisor.check()
    assert "prefill-0.1" not in house.workers
    assert process.killed


async def test_the_delay_doubles_while_it_fails_and_is_bounded(house: House) -> None:
    await house.supervisor.start()
    house.launcher.newest("decode-0").dead = True
    await house.supervisor.check()
    house.launcher.refuse = WorkerGone("again")
    delays = []
    for _ in range(8):
        place = house.place("decode-0")
        delays.append(place.since - house.clock.now())
        house.clock.advance(delays[-1])
        await house.supervisor.check()
        await house.settle()
    assert delays[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(delays) == 30.0


async def test_a_worker_reported_gone_is_replaced_though_it_answers(house: House) -> None:
    await house.supervisor.start()
    house.supervisor.report_gone("decode-0.1")
    await house.supervisor.check()
    assert house.launcher.newest("decode-0").killed
    assert "decode-0.1" not in house.workers


async def test_pings_are_the_metrics_sources(house: House) -> None:
    await house.supervisor.start()
    await house.supervisor.gather(1.0)
    totals = house.service.backend.metrics.totals
    assert totals.workers["verified_blocks"] == 2.0
    assert set(totals.shards) == {"shard-0", "shard-1"}
    assert totals.gauges["decode-0.1"] == {"running": 2.0}


async def test_stop_drains_workers_and_ends_all(house: House) -> None:
    await house.supervisor.start()
    await house.supervisor.stop(1.0)
    assert all(process.killed for process in house.launcher.made)
    assert house.launcher.newest("decode-0").drained
