"""From a configuration to a worker: model found and loaded, the loop running, the way to the store laid.

Prefill and decode are roles over one `Worker`. Loading takes as long as the model's weights need (0.5 s for
135M parameters) and happens in the engine thread, so that the event loop answers meanwhile. The store need
not be up: the worker then computes everything itself until it is. Raises ModelError's kinds and ConfigError.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from engine.announcing import Announcer
from engine.background import Background
from engine.edge import EdgeShard
from engine.edge_move import pull
from engine.edge_watch import EdgeWatch
from engine.engine import Engine
from engine.engine_thread import EngineThread
from engine.gate import LoadGate
from engine.local_run import LocalRun
from engine.onboard import Onboarding
from engine.parallel.processes import RankProcesses
from engine.parallel.session import Session
from engine.publisher import Publisher, PublishLimits
from engine.registry import resolve_model
from engine.store_link import Connect, StoreLink
from engine.turns import OrderedTurns, too_late, urgency_of
from engine.types import GenerationRequest, SamplingParams, WorkerInfo
from engine.updating import WeightsUpdate
from engine.worker import WorkerLoop
from engine.worker_config import RoleLimits, WorkerConfig
from kvstore.client import StoreClient
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import ConfigError, OverLimit, Unavailable
from kvstore.hashing import KeyChain
from kvstore.nouns import BlockKey, Epoch, NamespaceSpec, Quality
from kvstore.server import ServerConfig, ShardServer
from kvstore.topology import ShardEntry
from kvstore.transport.base import ShardTransport
from kvstore.transport.grpc.client import GrpcTransport

__all__ = ["Worker", "assemble", "boot"]

Reach = Callable[[ShardEntry], ShardTransport]
"""How another worker's edge shard is spoken to."""
_WARM_UP_TOKENS: Final = 64
_EDGE_GRACE_S: Final = 1.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Worker:
    """The parts a role is made of. One event loop's; `close` ends all of them."""

    info: WorkerInfo
    limits: RoleLimits
    clock: Clock
    loop: WorkerLoop
    store: StoreLink
    background: Background
    onboarding: Onboarding
    gate: LoadGate
    announcer: Announcer
    publisher: Publisher
    loading: OrderedTurns
    reach: Reach
    weights: WeightsUpdate
    edge: EdgeShard | None = None  # None: the pool keeps nothing when a sequence ends
    edge_watch: EdgeWatch | None = None
    edge_server: ShardServer | None = None
    kv_quality: Quality = Quality.LOSSLESS  # the most that KV which lay in this pool, or over it, may claim
    role_counters: Counter[str] = field(default_factory=Counter)
    ranks: RankProcesses | None = None  # where the engine has others

    @asynccontextmanager
    async def turn_to_load(self, request: GenerationRequest, arrived_at: float) -> AsyncIterator[None]:
        """Held while a request's KV is outside the engine, so that a long queue costs no memory. Those who
        hold them may find no room for long: one of a more urgent priority waits for none of them. Raises
        OverLimit when the turn does not come within `admit_timeout_s`, DeadlineExceeded when the request's
        own deadline passes before."""
        urgency = urgency_of(request, arrived_at, arrival=0)
        left_s, limit_s = urgency.deadline_at - self.clock.now(), self.limits.admit_timeout_s
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(min(left_s, limit_s)):
                    await turn.enter_async_context(self.loading.turn(urgency))
            except TimeoutError:
                if left_s < limit_s:
                    raise too_late(request) from None
                raise OverLimit(f"worker {self.info.worker_id} is full: ask another, or later") from None
            yield

    def lend(
        self, session: Session | None, tenant: str, chain: KeyChain, blocks_max: int, owner: str
    ) -> LocalRun | None:
        """What of a sequence's chain lies in this worker's pool, and its way to leave blocks there. None
        without an edge shard, and while the store is away: it makes the namespace that keys are of."""
        if self.edge is None or session is None:
            return None
        return self.edge.lend(session.namespace, tenant, chain, blocks_max, owner)

    async def pull(self, tenant: str, keys: Sequence[BlockKey], source: ShardEntry, timeout_s: float) -> int:
        """Move `keys`, a chain from its first block on, from another worker's pool into this one's; how many
        lie here then. What did not come is in the counters, and costs what it costs to compute. Raises
        Unavailable without a local cache, or while the store is away."""
        session = await self.store.session(tenant)
        if self.edge is None or session is None:
            raise Unavailable(
                f"worker {self.info.worker_id} cannot take blocks: set engine.local_cache = true, and see "
                "that the store can be reached"
            )
        transport = self.reach(source)
        try:
            pulled = await pull(self.edge, transport, session.namespace, tenant, keys, timeout_s=timeout_s)
        finally:
            await transport.close()
        return pulled.held + pulled.blocks

    async def forget_local(self) -> int:
        """Drop the blocks kept in this worker's pool; how many. What runs goes on with those it was lent."""
        return 0 if self.edge is None else await self.edge.forget()

    async def serve_edge(self, host: str, token: str | None) -> None:
        """Let other workers read the pool, from here on at `info.edge_address`. Raises ConfigError."""
        if self.edge is None:
            raise ConfigError(
                "edge_host serves the local cache: set engine.local_cache = true, or leave it out"
            )
        self.edge_server = ShardServer(self.edge.driver, ServerConfig(host, token=token))
        self.info = replace(self.info, edge_address=await self.edge_server.start())

    def counters(self) -> dict[str, float]:
        """Counters of engine, role and store client, merged; "gauge:..." are as they stand now.

        Raises RanksLost when the engine cannot go on: this worker is to be replaced."""
        if self.ranks is not None:
            self.ranks.check()
        parts = (
            self.loop.counters,
            self.publisher.counters,
            self.background.counters,
            self.store.counters,
            self.store.client_counters,
            self.gate.counters,
            self.announcer.counters,
            self.role_counters,
            self.edge.counters if self.edge is not None else Counter[str](),
        )
        merged: Counter[str] = Counter()
        for part in parts:
            merged.update(part)
        gauges = {
            "gauge:running": self.loop.running,
            "gauge:waiting": self.loop.waiting,
            "gauge:held": self.loop.held,
            "gauge:publishing_nbytes": self.publisher.inflight_nbytes,
            "gauge:background_tasks": len(self.background),
            **(self.edge.gauges() if self.edge is not None else {}),
            **self.gate.gauges(),
        }
        return {name: float(value) for name, value in {**merged, **gauges}.items()}

    async def close(self, timeout_s: float = 5.0) -> None:
        """Finish what runs in the background within `timeout_s`, then end engine and store connections."""
        if self.edge_server is not None:
            await self.edge_server.stop(_EDGE_GRACE_S)
        if self.edge_watch is not None:
            await self.edge_watch.close()
        await self.background.close(timeout_s)
        await self.loop.close()
        if self.ranks is not None:
            await asyncio.to_thread(self.ranks.close)
        if self.edge is not None:
            await self.edge.close()
        await self.store.close()


async def boot(config: WorkerConfig, *, node_id: str = "", clock: Clock | None = None) -> Worker:
    """Find and load the model, start the loop. The store is first asked by the first request."""
    thread = EngineThread()
    try:
        folder = await asyncio.to_thread(resolve_model, config.model)
        engine = await thread.submit(Engine.load, folder, config.engine)
        await thread.submit(_warm_up, engine)
    except BaseException:
        await thread.close()
        raise
    connect: Connect = partial(StoreClient.connect, token=config.token, tls=config.store_tls)
    worker = assemble(config, engine, thread, connect, node_id=node_id, clock=clock)
    if config.edge_host is not None:
        try:
            await worker.serve_edge(config.edge_host, config.token)
        except BaseException:
            await worker.close()
            raise
    log.info("worker ready", worker=config.worker_id, model=worker.info.model_id, pid=worker.info.pid)
    return worker


def _warm_up(engine: Engine) -> None:
    """Pay for what the first products and pages cost before somebody waits for them."""
    tokens = min(_WARM_UP_TOKENS, engine.max_model_len - 2)
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    request = GenerationRequest("warm-up", 0, (0,) * tokens, sampling)
    if tokens > 0 and engine.can_admit(request):
        engine.admit(request)
        while engine.has_work():
            engine.step()


def assemble(
    config: WorkerConfig,
    engine: Engine,
    thread: EngineThread,
    connect: Connect,
    *,
    node_id: str = "",
    clock: Clock | None = None,
    reach: Reach | None = None,
) -> Worker:
    """The parts around a loaded engine, the loop started. `connect` makes the store's client, `reach` the
    transport to another worker's pool (None: gRPC)."""
    limits, clock = config.limits, clock or MonotonicClock()
    info = _info(config, engine, node_id)
    background = Background()
    spec = NamespaceSpec(info.model_id, engine.layout, engine.tokenizer.digest)
    epoch = Epoch(config.epoch_number, engine.weights_digest)
    store = StoreLink(
        connect,
        config.topology,
        spec,
        epoch,
        background,
        clock,
        min_quality=config.min_quality,
        stale_lag_max=config.stale_lag_max,
        other_ranks=[replace(spec, layout=layout) for layout in engine.pool.layouts[1:]],
        connect_timeout_s=limits.connect_timeout_s,
    )
    publish_limits = PublishLimits(
        inflight_nbytes_max=limits.publish_inflight_nbytes_max, timeout_s=limits.publish_timeout_s
    )
    edge = edge_watch = None
    if config.engine.local_cache and info.ranks == 1:  # blocks in a pool of many are no shard's
        edge = _edge(config, spec, epoch, engine, clock)
        edge.start()
        edge_watch = EdgeWatch(edge, store)
        edge_watch.start()
    loop = WorkerLoop(engine, thread, waiting_max=limits.requests_max, edge=edge, clock=clock)
    loop.start()
    return Worker(
        info=info,
        limits=limits,
        clock=clock,
        loop=loop,
        store=store,
        background=background,
        onboarding=Onboarding(store, background),
        announcer=Announcer(
            store,
            background,
            engine.layout.block_tokens,
            announcing_max=limits.announcing_max,
            timeout_s=limits.match_timeout_s,
        ),
        gate=LoadGate(engine.layout.block_tokens, is_on=limits.load_gate),
        publisher=Publisher(store, background, publish_limits),
        loading=OrderedTurns(limits.loading_max, beyond=True),
        reach=reach or _over_grpc(config),
        weights=WeightsUpdate(engine, thread),
        edge=edge,
        edge_watch=edge_watch,
        kv_quality=config.engine.kv_quality,
        ranks=engine.ranks,
    )


def _edge(config: WorkerConfig, spec: NamespaceSpec, epoch: Epoch, engine: Engine, clock: Clock) -> EdgeShard:
    return EdgeShard(
        config.worker_id,
        spec,
        epoch,
        engine.pool,
        engine.slots,
        clock,
        min_quality=config.min_quality,
        kv_quality=config.engine.kv_quality,
    )


def _info(config: WorkerConfig, engine: Engine, node_id: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=config.worker_id,
        model_id=config.model_id or Path(config.model).name,
        weights_digest=engine.weights_digest,
        layout=engine.layout,
        max_model_len=engine.max_model_len,
        epoch_number=config.epoch_number,
        ranks=len(engine.pool.layouts),
        pid=os.getpid(),
        node_id=node_id,
    )


def _over_grpc(config: WorkerConfig) -> Reach:
    credentials = config.store_tls.channel_credentials() if config.store_tls else None
    return lambda entry: GrpcTransport(entry.shard, entry.address, config.token, credentials)
