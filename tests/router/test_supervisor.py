"""Promise of supervision: what runs becomes what is configured again, and nobody is told of the dead."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.errors import ModelNotFound
from kvstore.clock import ManualClock
from kvstore.nouns import Incarnation, ShardId
from kvstore.topology import Topology
from kvstore.transport.base import ShardStatus
from router.errors import StartFailed, WorkerGone
from router.launcher import Kind, LaunchedShard, LaunchedWorker
from router.supervisor import Place, Supervision, Supervisor
from tests.router.fakes import FakeDecode, FakePrefill, FakeService, Script, facts, fake_service


@dataclass
class FakeProcess:
    name: str
    dead: bool = False
    hung: bool = False
    killed: bool = False
    drained: bool = False
    topologies: list[Topology] = field(default_factory=list)

    async def set_topology(self, topology: Topology) -> None:
        self.topologies.append(topology)

    async def drain(self, timeout_s: float) -> None:
        self.drained = True

    def kill(self) -> None:
        self.killed = True

    async def _alive(self) -> None:
        if self.dead:
            raise WorkerGone(f"{self.name} is dead")
        if self.hung:
            await asyncio.Event().wait()

    async def counters(self) -> Mapping[str, float]:
        await self._alive()
        return {"verified_blocks": 1.0, "gauge:running": 2.0}

    async def status(self) -> ShardStatus:
        await self._alive()
        return ShardStatus(ShardId(self.name), Incarnation(1), 1, 10, 5, 0, 0, 0, 1, 0, 0.0)

    async def flip_stored_byte(self) -> str | None:
        return None


@dataclass
class FakeLauncher:
    """Ports grow, so that a shard that comes back is elsewhere."""

    script: Script
    made: list[FakeProcess] = field(default_factory=list)
    refuse: Exception | None = None

    async def shard(self, shard: ShardId) -> LaunchedShard:
        process = self._make(shard)
        return LaunchedShard(process, f"127.0.0.1:{1000 + len(self.made)}", 1)

    async def worker(self, kind: Kind, worker_id: str) -> LaunchedWorker:
        process = self._make(worker_id)
        handle = FakePrefill(self.script) if kind is Kind.PREFILL else FakeDecode(self.script)
        return LaunchedWorker(process, facts(worker_id), handle)

    def _make(self, name: str) -> FakeProcess:
        if self.refuse is not None:
            raise self.refuse
        self.made.append(FakeProcess(name))
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
