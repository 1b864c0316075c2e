"""The store as a reader or writer sees it: N shards, one client.

    async with await StoreClient.connect(topology, token=token) as client:
        session = await client.open(spec, epoch)
        match = await session.match(keys, owner="me", lease_s=10, timeout_s=1)

The client owns the connections and the counters; a `StoreSession` (session.py) is one namespace at one
epoch on all of them. A shard that is down, slow or restarted costs bounded waits and misses, never an
error: only `open` raises, when no shard at all answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import grpc
import structlog

from kvstore.errors import KVStrataError, Unavailable
from kvstore.nouns import Epoch, NamespaceSpec, Quality, ShardId, Snapshot
from kvstore.peers import Peers
from kvstore.session import StoreSession
from kvstore.tls import ClientTls
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import ShardStatus, ShardTransport
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.transport.shm.transport import SameHostTransport

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Bounds of one client, in seconds and counts."""

    connect_timeout_s: float = 5.0
    status_timeout_s: float = 2.0


class StoreClient:
    """Belongs to one event loop."""

    def __init__(
        self,
        topology: Topology,
        transports: Sequence[ShardTransport],
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        limits: ClientLimits | None = None,
        shared_memory: bool = True,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.topology = topology
        self._shared_memory = shared_memory
        self._token = token
        self._credentials = credentials
        self._limits = limits or ClientLimits()
        self._peers = Peers(topology.weights(), {t.shard: t for t in transports}, self.counters)

    @classmethod
    async def connect(
        cls,
        topology: Topology,
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        tls: ClientTls | None = None,
        limits: ClientLimits | None = None,
        shared_memory: bool = True,
    ) -> StoreClient:
        """A client of the topology's shards over gRPC. Connections are made by the first calls.

        The bytes of shards on this host go through shared memory where that works, unless
        `shared_memory` is False. `token` is the cluster's (then `open` names the tenant) or a tenant's own.
        `tls` names PEM files, in place of `credentials`. Raises ConfigError for a file that cannot be read.
        """
        if tls is not None:
            credentials = tls.channel_credentials()
        made = cls(
            topology, (), token=token, credentials=credentials, limits=limits, shared_memory=shared_memory
        )
        made._peers.replace(topology.weights(), {e.shard: made._transport(e) for e in topology.shards})
        return made

    @classmethod
    def over(cls, transports: Sequence[ShardTransport], *, limits: ClientLimits | None = None) -> StoreClient:
        """A client of shards in this process (or of any transport), equally weighted."""
        return cls(local_topology([t.shard for t in transports]), transports, limits=limits)

    async def open(
        self,
        spec: NamespaceSpec,
        epoch: Epoch,
        *,
        tenant: str = "default",
        min_quality: Quality = Quality.LOSSLESS,
        stale_lag_max: int = 0,
    ) -> StoreSession:
        """Open the namespace and register the epoch on every shard that answers.

        A shard that does not is opened when it is next used. Raises Unavailable when none answers, and
        EpochConflict when the epoch's number is bound to other weights.
        """
        timeout_s = self._limits.connect_timeout_s
        answers = await asyncio.gather(
            *(t.open_namespace(spec, tenant, timeout_s=timeout_s) for t in self._peers.transports.values()),
            return_exceptions=True,
        )
        ids = [answer for answer in answers if isinstance(answer, bytes)]
        if not ids:
            raise Unavailable(f"no shard of {list(self._peers.transports)} answers: {answers}")
        if len(set(ids)) > 1:
            raise Unavailable("the shards do not share one cluster secret: their namespaces differ")
        snapshot = Snapshot(ids[0], epoch, min_quality, stale_lag_max)
        session = StoreSession(self._peers, spec, tenant, snapshot)
        await session.register(timeout_s)
        return session

    async def update_topology(self, topology: Topology) -> None:
        """Move to a newer topology: shards that left or moved are closed, new ones connected lazily."""
        if topology.version <= self.topology.version:
            return
        before = {e.shard: e.address for e in self.topology.shards}
        gone = [t for s, t in self._peers.transports.items() if before.get(s) != _address(topology, s)]
        kept = {t.shard: t for t in self._peers.transports.values() if t not in gone}
        for entry in topology.shards:
            if entry.shard not in kept:
                kept[entry.shard] = self._transport(entry)
        self.topology = topology
        self._peers.replace(topology.weights(), kept)
        await _close_all(gone)

    def _transport(self, entry: ShardEntry) -> ShardTransport:
        if self._shared_memory:
            return SameHostTransport(
                entry.shard, entry.address, self._token, self._credentials, self.counters
            )
        return GrpcTransport(entry.shard, entry.address, self._token, self._credentials)

    async def status(self) -> list[ShardStatus]:
        """Of every shard that answers in time."""
        timeout_s = self._limits.status_timeout_s
        answers = await asyncio.gather(
            *(t.status(timeout_s=timeout_s) for t in self._peers.transports.values()), return_exceptions=True
        )
        return [answer for answer in answers if isinstance(answer, ShardStatus)]

    async def close(self) -> None:
        await self._peers.finish_errands()
        await _close_all(list(self._peers.transports.values()))

    async def __aenter__(self) -> StoreClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def local_topology(shards: Sequence[ShardId]) -> Topology:
    return Topology(0, tuple(ShardEntry(shard, "in-process") for shard in shards))


def _address(topology: Topology, shard: ShardId) -> str | None:
    return next((e.address for e in topology.shards if e.shard == shard), None)


async def _close_all(transports: Sequence[ShardTransport]) -> None:
    for transport in transports:
        with contextlib.suppress(KVStrataError):  # a peer that is gone needs no goodbye
            await transport.close()
