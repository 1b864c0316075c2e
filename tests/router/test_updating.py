"""One call changes the weights of a whole service under load; what each mode promises, seen by clients.

The service is the real one but for its processes: roles, shards and router share this event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from pydantic import SecretStr

from decode.role import DecodeRole
from engine.boot import Worker
from engine.types import GenerationRequest, TokenEvent, UpdateMode, WorkerInfo
from kvstore.driver import ShardDriver
from kvstore.errors import DeadlineExceeded, KVStrataError, Unavailable
from kvstore.nouns import ISOLATE, Epoch, ShardId
from kvstore.topology import Topology
from kvstore.transport.base import ShardStatus, ShardTransport
from prefill.role import PrefillRole
from router.api.admin import ADMIN_HEADER
from router.attempts import Job
from router.config import RoleConfig, RouterConfig, ServiceConfig
from router.errors import GenerationFailed, WorkerGone
from router.handles import WorkerFacts
from router.launcher import Kind, LaunchedShard, LaunchedWorker
from router.service import RouterService
from router.updating import WantedWeights
from tests.role_parts import CACHING, WAIT_S, make_worker, over, prompt, request, shard
from tests.tiny_model import make_tiny_model
from tests.weights_parts import Oracle, assert_drawn_by_fresh_engines, inspect

DRAIN, ABORT, KEEP, RECOMPUTE = UpdateMode
TOKEN = "the service's own token"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    root = tmp_path_factory.mktemp("epochs")
    return Oracle([make_tiny_model(root / str(seed), seed) for seed in range(3)])


@dataclass(eq=False)
class ShardProcess:
    driver: ShardDriver
    refuses: Exception | None = None

    async def set_topology(self, topology: Topology) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    def kill(self) -> None: ...

    async def status(self) -> ShardStatus:
        return await self.driver.status(timeout_s=WAIT_S)

    async def flip_stored_byte(self) -> str | None:
        return None

    async def advance_epoch(self, model_id: str, epoch: Epoch) -> None:
        if self.refuses is not None:
            raise self.refuses
        await self.driver.register_epoch(model_id, epoch, timeout_s=WAIT_S)
        await self.driver.advance_epoch(model_id, epoch.number, ISOLATE, timeout_s=WAIT_S)


@dataclass
class Shared:
    """A shard that outlives the workers that speak to it."""

    driver: ShardDriver

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    async def close(self) -> None: ...


@dataclass(eq=False)
class WorkerProcess:
    """A role on this event loop, as a process. `dead`: it answers no more."""

    worker: Worker
    role: PrefillRole | DecodeRole
    ending: set[asyncio.Task[None]]
    dead: bool = False

    async def set_topology(self, topology: Topology) -> None: ...

    async def drain(self, timeout_s: float) -> None:
        await self.role.drain(timeout_s)

    def kill(self) -> None:
        if not self.dead:
            self.dead = True
            self.ending.add(asyncio.create_task(self.role.close()))

    async def counters(self) -> dict[str, float]:
        self._alive()
        return await self.role.counters()

    async def forget_local(self) -> int:
        return await self.role.forget_local()

    async def prepare_weights(self, path: str, number: int) -> Epoch:
        self._alive()
        return await self.role.prepare_weights(path, number)

    async def discard_weights(self) -> None:
        await self.role.discard_weights()

    async def update_weights(self, path: str, number: int, mode: UpdateMode, timeout_s: float) -> WorkerInfo:
        self._alive()
        return await self.role.update_weights(path, number, mode, timeout_s)

    def _alive(self) -> None:
        if self.dead:
            raise WorkerGone("it is dead")


@dataclass
class RoleLauncher:
    path: str
    number: int = 1
    shards: list[ShardProcess] = field(default_factory=list)
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    ending: set[asyncio.Task[None]] = field(default_factory=set)

    async def shard(self, name: ShardId) -> LaunchedShard:
        self.shards.append(ShardProcess(shard(name)))
        return LaunchedShard(self.shards[-1], "127.0.0.1:1", 1)

    async def worker(self, kind: Kind, worker_id: str) -> LaunchedWorker:
        connect = over([cast(ShardTransport, Shared(one.driver)) for one in self.shards])
        worker, _ = make_worker(
            Path(self.path), connect, name=worker_id, engine=CACHING, epoch_number=self.number
        )
        role = PrefillRole(worker) if kind is Kind.PREFILL else DecodeRole(worker)
        process = self.workers[worker_id] = WorkerProcess(worker, role, self.ending)
        info = worker.info
        facts = WorkerFacts(
            worker_id, Epoch(info.epoch_number, info.weights_digest), info.max_model_len, info.pid
        )
        return LaunchedWorker(process, facts, role)

    def serve_weights(self, path: str, number: int) -> None:
        self.path, self.number = path, number


@dataclass
class House:
    """`said` is what each client got, `failed` what its answer ended with."""

    oracle: Oracle
    launcher: RoleLauncher
    service: RouterService
    url: str
    said: dict[str, list[TokenEvent]] = field(default_factory=dict)
    asked: dict[str, GenerationRequest] = field(default_factory=dict)
    failed: dict[str, KVStrataError] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    spoke: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, name: str, n: int, max_tokens: int = 24) -> None:
        for i in range(n):
            asked = request(prompt(19) + prompt(3 + 7 * i, i), name=f"{name}{i}", max_tokens=max_tokens)
            self.asked[asked.request_id], self.said[asked.request_id] = asked, []
            self.tasks.append(asyncio.create_task(self._client(asked)))

    async def _client(self, asked: GenerationRequest) -> None:
        orchestrator, said = self.service._backend.orchestrator, self.said[asked.request_id]
        job = Job(asked.request_id, asked.prompt_ids, asked.sampling)
        try:
            async for piece in orchestrator.generate(job):
                event = TokenEvent(
                    asked.request_id, 1, len(said), piece.token_id, piece.finish, epochs=piece.epochs
                )
                said.append(event)
                self.spoke.set()
        except KVStrataError as error:
            self.failed[asked.request_id] = error

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true():
                self.spoke.clear()
                await self.spoke.wait()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.said.values()))

    async def over(self) -> None:
        async with asyncio.timeout(2 * WAIT_S):
            await asyncio.gather(*self.tasks)

    async def prepared(self, number: int) -> None:
        """So that the update meets what runs when it is told to, however long loading takes."""
        for process in self.launcher.workers.values():
            await process.role.prepare_weights(self.oracle.path(number), number)

    async def update(self, number: int, mode: UpdateMode, timeout_s: float = WAIT_S) -> dict[str, Any]:
        wanted = WantedWeights(self.oracle.path(number), number, mode, timeout_s)
        return await self.service.update_weights(wanted)

    def assert_whole(self) -> None:
        assert self.failed == {}
        for name, said in self.said.items():
            assert len(said) == self.asked[name].sampling.max_tokens, name

    async def assert_clean(self) -> None:
        living = [process for process in self.launcher.workers.values() if not process.dead]
        for process in living:
            assert await process.worker.background.settle(WAIT_S)
            await process.worker.loop.settled()
        edges = [process.worker.edge for process in living]
        drivers = [edge.driver for edge in edges if edge is not None]
        texts = [
            (*self.asked[name].prompt_ids, *(event.token_id for event in said))
            for name, said in self.said.items()
        ]
        await inspect(self.oracle, [*(one.driver for one in self.launcher.shards), *drivers], texts)

    @property
    def epochs(self) -> set[int]:
        fleet = self.service._backend.orchestrator.fleet
        return {member.facts.epoch.number for member in (*fleet.prefill.values(), *fleet.decode.values())}


@asynccontextmanager
async def house_of(oracle: Oracle, workers: int = 2) -> AsyncIterator[House]:
    launcher = RoleLauncher(oracle.path(1))
    config = ServiceConfig(
        model="tiny",
        epoch=1,
        prefill=RoleConfig(workers=workers),
        decode=RoleConfig(workers=workers),
        router=RouterConfig(port=0, api_key=SecretStr("a client's key"), restart_delay_s=0.0),
    )
    service = RouterService(config, oracle.folders[1], launcher, told=lambda _: None, admin_token=TOKEN)
    url = await service.open()
    await service.bring_up()
    house = House(oracle, launcher, service, url)
    try:
        yield house
    finally:
        for task in house.tasks:
            task.cancel()
        await asyncio.gather(*house.tasks, return_exceptions=True)
        await service.close(0.0)
        await asyncio.gather(*launcher.ending)


@pytest.mark.parametrize("mode", [DRAIN, KEEP, RECOMPUTE])
async def test_nobody_is_lost_and_each_answer_names_its_epochs(oracle: Oracle, mode: UpdateMode) -> None:
    async with house_of(oracle) as house:
        await house.prepared(2)
        house.begin("a", 6)
        await house.until(lambda: house.tokens > 40)
        updating = asyncio.create_task(house.update(2, mode))
        house.begin("b", 4)
        report = await updating
        assert sorted(report["changed"]) == ["decode-0.1", "decode-1.1", "prefill-0.1", "prefill-1.1"]
        assert (report["replaced"], report["not_advanced"]) == ([], {})
        house.begin("c", 4)
        await house.over()
        house.assert_whole()
        named = {name: {event.epochs for event in said} for name, said in house.said.items()}
        for name, said in house.said.items():
            if (1, 2) not in named[name]:
                assert_drawn_by_fresh_engines(oracle, house.asked[name], said)
        caught = [name for name, epochs in named.items() if len(epochs) > 1]
        assert bool(caught) == (mode is not DRAIN)
        assert ((1, 2) in set().union(*named.values())) == (mode is KEEP)
        assert all(named[f"c{i}"] == {(2,)} for i in range(4))
        for process in house.launcher.shards:
            known = await process.driver.epochs("tiny", timeout_s=WAIT_S)
            assert known.current == 2, "the store advances with its workers"
        await house.assert_clean()


async def test_abort_fails_answers_that_began_and_no_others(oracle: Oracle) -> None:
    async with house_of(oracle) as house:
        await house.prepared(2)
        house.begin("a", 6, max_tokens=200)
        await house.until(lambda: all(house.said.values()))
        updating = asyncio.create_task(house.update(2, ABORT))
        house.begin("b", 4)
        await updating
        house.begin("c", 4)
        await house.over()
        assert {f"a{i}" for i in range(6)} <= house.failed.keys()
        assert not {f"c{i}" for i in range(4)} & house.failed.keys()
        for error in house.failed.values():
            assert isinstance(error, GenerationFailed)
            assert error.code == "epoch_gone"
        for name, said in house.said.items():
            assert_drawn_by_fresh_engines(oracle, house.asked[name], said)
            assert {event.epochs for event in said} == {(1,) if name in house.failed else (2,)}
        await house.assert_clean()


async def test_a_worker_that_cannot_load_them_changes_nobody(oracle: Oracle, tmp_path: Path) -> None:
    async with house_of(oracle, workers=1) as house:
        house.begin("a", 3)
        other = make_tiny_model(tmp_path / "other", num_hidden_layers=3)
        wanted = WantedWeights(str(other), 2, RECOMPUTE, WAIT_S)
        with pytest.raises(KVStrataError, match="another shape: layers 3"):
            await house.service.update_weights(wanted)
        house.launcher.workers["decode-0.1"].dead = True
        with pytest.raises(WorkerGone):
            await house.update(2, RECOMPUTE)
        house.launcher.workers["decode-0.1"].dead = False
        assert house.epochs == {1}
        assert all(p.worker.weights._prepared is None for p in house.launcher.workers.values())
        await house.over()
        house.assert_whole()
        assert {event.epochs for said in house.said.values() for event in said} == {(1,)}


async def test_a_worker_that_fails_to_change_is_replaced_by_one_that_has_them(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house_of(oracle) as house:
        broken = house.launcher.workers["decode-0.1"]

        async def fails(*_: object) -> WorkerInfo:
            raise Unavailable("out of memory")

        monkeypatch.setattr(broken, "update_weights", fails)
        await house.prepared(2)
        house.begin("a", 6)
        await house.until(lambda: house.tokens > 30)
        report = await house.update(2, RECOMPUTE)
        assert report["replaced"] == ["decode-0.1"]
        house.begin("b", 3)
        await house.over()
        house.assert_whole()
        for name, said in house.said.items():
            assert_drawn_by_fresh_engines(oracle, house.asked[name], said)
        async with asyncio.timeout(WAIT_S):
            while "decode-0.2" not in house.launcher.workers:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert house.epochs == {2}
        await house.assert_clean()


async def test_drain_that_takes_too_long_changes_nobody_and_lets_all_in_again(oracle: Oracle) -> None:
    async with house_of(oracle, workers=1) as house:
        await house.prepared(2)
        house.begin("a", 2, max_tokens=120)
        await house.until(lambda: house.tokens > 4)
        updating = asyncio.create_task(house.update(2, DRAIN, timeout_s=0.05))
        house.begin("b", 2)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="under way"):
            await house.update(3, KEEP)
        with pytest.raises(DeadlineExceeded, match="old weights stay"):
            await updating
        await house.over()
        house.assert_whole()
        assert {event.epochs for said in house.said.values() for event in said} == {(1,)}
        assert house.epochs == {1}


async def test_over_http_the_service_tells_its_epochs_streamed_and_not(oracle: Oracle) -> None:
    async with house_of(oracle, workers=1) as house, httpx.AsyncClient(base_url=house.url) as client:
        client.headers["authorization"] = "Bearer a client's key"
        body = {"model": "tiny", "prompt": [list(prompt(30))], "max_tokens": 16, "ignore_eos": True}
        whole = await client.post("/v1/completions", json=body | {"temperature": 0})
        assert whole.json()["kvstrata"]["epochs"] == [1]
        update = {"path": oracle.path(2), "epoch": 2, "mode": "recompute"}
        for token, status in (("", 403), ("a client's key", 403), (TOKEN, 200)):
            answer = await client.post("/kvstrata/weights", json=update, headers={ADMIN_HEADER: token})
            assert answer.status_code == status, answer.text
        assert answer.json()["weights_digest"] == oracle.engine(2).weights_digest.hex()
        lines = (await client.post("/v1/completions", json=body | {"stream": True})).text.splitlines()
        (told,) = [line for line in lines if "kvstrata" in line]
        assert '"epochs":[2]' in told
        status = (await client.get("/kvstrata/status")).json()
        assert status["epochs"] == [2]
        assert {row["epoch"] for row in status["workers"]} == {2}
        for wrong, code in (({"epoch": 1}, 400), ({"path": "/nowhere", "epoch": 3}, 404)):
            answer = await client.post(
                "/kvstrata/weights", json=update | wrong, headers={ADMIN_HEADER: TOKEN}
            )
            assert answer.status_code == code, answer.text
