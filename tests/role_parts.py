"""What the tests of the roles are built from: a tiny model, shards in this process, workers around both."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decode.role import DecodeRole
from engine.boot import Worker, assemble
from engine.config import EngineConfig
from engine.engine import Engine
from engine.engine_thread import EngineThread
from engine.store_link import Connect
from engine.types import FinishReason, FirstToken, GenerationRequest, Handoff, SamplingParams, TokenEvent
from engine.worker_config import RoleLimits, WorkerConfig
from kvstore.client import StoreClient
from kvstore.clock import Clock, ManualClock, MonotonicClock
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.nouns import Quality, ShardId
from kvstore.tiers.host import HostTier
from kvstore.topology import Topology
from kvstore.transport.base import ShardTransport
from prefill.role import PrefillRole
from tests.tiny_model import VOCAB_SIZE

BLOCK_TOKENS = 8
SECRET = b"a secret of a cluster in a test."
WAIT_S = 30.0
"""The bound of every wait in these tests: far beyond what any needs."""

ENGINE = EngineConfig(
    threads=1,  # tiny matrices: more threads only wait for each other
    block_tokens=BLOCK_TOKENS,
    pool_blocks=256,
    step_tokens_max=48,
    running_max=16,
    max_model_len=512,
    local_cache=False,  # these tests look at the way over the store; CACHING is for those of the pool
)
CACHING = ENGINE.model_copy(update={"local_cache": True})


def shard(
    name: str = "s0",
    capacity_nbytes: int = 64 << 20,
    clock: Clock | None = None,
    storage: HostTier | None = None,
) -> ShardDriver:
    config = DriverConfig(ShardId(name), capacity_nbytes, SECRET, faults=True)
    return ShardDriver(config, storage or HostTier(), clock)


def over(transports: Sequence[ShardTransport]) -> Connect:
    """A worker's way to shards in this process."""

    async def connect(_topology: Topology) -> StoreClient:
        return StoreClient.over(transports)

    return connect


def make_worker(
    folder: Path,
    connect: Connect,
    *,
    name: str = "w",
    clock: Clock | None = None,
    engine: EngineConfig = ENGINE,
    epoch_number: int = 1,
    min_quality: Quality = Quality.LOSSLESS,
    stale_lag_max: int = 0,
    engine_class: type[Engine] = Engine,
    **limits: Any,
) -> tuple[Worker, Engine]:
    """A worker with an engine of its own, which comes along so that a test can look into it."""
    config = WorkerConfig(
        worker_id=name,
        model=str(folder),
        model_id="tiny",
        engine=engine,
        topology=Topology(0, ()),
        epoch_number=epoch_number,
        min_quality=min_quality,
        stale_lag_max=stale_lag_max,
        # Tests count what is cached. The gate may compute a tiny model's blocks instead, and rightly so.
        limits=RoleLimits(**{"load_gate": False} | limits),
    )
    loaded = engine_class.load(folder, engine)
    return assemble(config, loaded, EngineThread(), connect, clock=clock or MonotonicClock()), loaded


def prompt(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids of no special token."""
    draw = random.Random(f"{seed}/{tokens}")
    return tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(tokens))


def request(
    prompt_ids: Sequence[int],
    *,
    name: str = "r",
    attempt: int = 1,
    max_tokens: int = 12,
    temperature: float = 0.0,
    seed: int = 0,
    output_ids: Sequence[int] = (),
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
    return GenerationRequest(name, attempt, tuple(prompt_ids), sampling, tuple(output_ids))


@dataclass
class Pair:
    """A prefill and a decode worker over the same shards."""

    prefill: PrefillRole
    decode: DecodeRole
    engines: tuple[Engine, Engine]
    workers: tuple[Worker, Worker]
    shards: Sequence[ShardDriver]
    cursor: int = 0

    async def generate(self, asked: GenerationRequest) -> tuple[FirstToken, tuple[int, ...]]:
        """The first token, and all output tokens, by the way a router takes."""
        first = await self.prefill.prefill(asked)
        handoff = await self.prefill.handoff(asked.request_id, asked.attempt)
        tokens = (*asked.output_ids, first.event.token_id)
        return first, tokens if handoff is None else await self.decode_all(handoff)

    async def decode_all(self, handoff: Handoff) -> tuple[int, ...]:
        """All output tokens of one handoff."""
        return (await self.decode_each([handoff]))[0]

    async def decode_each(self, handoffs: Sequence[Handoff]) -> list[tuple[int, ...]]:
        """Start all, then poll until each has ended: so that they share batches."""
        for handoff in handoffs:
            await self.decode.start(handoff)
        events = await self.events_of([handoff.request.request_id for handoff in handoffs])
        return [_output(h, events[h.request.request_id]) for h in handoffs]

    async def events_of(self, request_ids: Sequence[str]) -> dict[str, list[TokenEvent]]:
        """Poll until every one of the requests had its last event."""
        events: dict[str, list[TokenEvent]] = {request_id: [] for request_id in request_ids}
        async with asyncio.timeout(WAIT_S):
            while not all(said and said[-1].finish for said in events.values()):
                polled = await self.decode.poll(self.cursor, 5.0)
                self.cursor = polled.cursor
                for event in polled.events:
                    events.setdefault(event.request_id, []).append(event)
        return events

    async def assert_nothing_held(self) -> None:
        """Promise: whatever happened, no slot, lease, staged byte or task is left behind."""
        for worker, engine in zip(self.workers, self.engines, strict=True):
            assert await worker.background.settle(WAIT_S)
            await worker.loop.settled()
            kept = check_pool(worker, engine)
            assert engine.free_blocks + kept == engine.config.pool_blocks
            assert worker.loop.held == 0
            assert worker.edge is None or (worker.edge.lent_slots(), worker.edge.driver.core.leases) == (
                [],
                0,
            )
            assert worker.publisher.inflight_nbytes == 0
        await assert_store_is_free(self.shards)


def check_pool(worker: Worker, engine: Engine) -> int:
    """Conservation: free, private and kept slots are all there are, each with its owner. How many are
    kept."""
    edge = worker.edge
    if edge is None:
        engine.check_integrity()
        return 0
    edge.check_integrity()
    kept = edge.tier.kept_slots()
    engine.check_integrity(edge.lent_slots(), kept)
    return len(kept)


def _output(handoff: Handoff, events: list[TokenEvent]) -> tuple[int, ...]:
    begin = len(handoff.request.output_ids)
    assert [event.index for event in events] == [*range(begin, begin + len(events))], "lost or doubled"
    assert events[-1].finish is not FinishReason.ERROR, events[-1].error
    return (*handoff.request.output_ids, *(event.token_id for event in events))


async def assert_store_is_free(shards: Sequence[ShardDriver]) -> None:
    for driver in shards:
        driver.check_integrity()
        status = await driver.status(timeout_s=1.0)
        assert (status.ownerless_nbytes, status.leases, status.staged_nbytes) == (0, 0, 0)


def expire_leases(driver: ShardDriver, clock: ManualClock, seconds: int = 120) -> int:
    """Let time pass tick by tick (one leap would be a pause of the shard, and extend the leases)."""
    expired = 0
    for _ in range(seconds):
        clock.advance(1.0)
        expired += driver.core.reap(clock.now())
    return expired


@asynccontextmanager
async def pair_over(
    folder: Path, shards: Sequence[ShardDriver], *, connect: Connect | None = None, **options: Any
) -> AsyncIterator[Pair]:
    """Both roles on this event loop, closed at the end. `options` are make_worker's."""
    connect = connect or over(shards)
    prefiller, prefill_engine = make_worker(folder, connect, name="p0", **options)
    decoder, decode_engine = make_worker(folder, connect, name="d0", **options)
    engines, workers = (prefill_engine, decode_engine), (prefiller, decoder)
    pair = Pair(PrefillRole(prefiller), DecodeRole(decoder), engines, workers, shards)
    try:
        yield pair
    finally:
        await pair.prefill.close()
        await pair.decode.close()


def later(asked: GenerationRequest) -> GenerationRequest:
    """The next attempt of the same request."""
    return replace(asked, attempt=asked.attempt + 1)
