"""The store as a reader or writer sees it: N shards, one client.

    async with StoreClient.connect_to(["127.0.0.1:7400"], token=token) as client:
        session = await client.open(spec, epoch)
        n_tokens, kv, misses, lineage = await session.get(token_ids)

The client owns the connections and the counters; a `StoreSession` (session.py) is one namespace at one
epoch on all of them. A shard that is down, slow or restarted costs bounded waits and misses, never an
error: only `open` raises, when no shard at all answers. What must reach every shard (epochs, purge,
compaction) raises `Incomplete` when it did not. docs/python-api.md has examples.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import grpc
import structlog

from kvstore.errors import KVStrataError, Unavailable
from kvstore.everywhere import Page, compact_on, each, everywhere, listing, purge_on
from kvstore.merged_watch import Reopen, Watch
from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    Epoch,
    EpochPolicy,
    EpochsOfModel,
    KnownNamespace,
    NamespaceId,
    NamespaceSpec,
    Quality,
    Revision,
    ShardId,
    Snapshot,
)
from kvstore.opening import Opening, discover, start_in_process
from kvstore.peers import Peers
from kvstore.session import StoreSession
from kvstore.store_file import StoreFile, StoreFolder
from kvstore.tls import ClientTls
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import Purged, ShardStatus, ShardTransport
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.transport.shm.transport import SameHostTransport

ADMIN_TIMEOUT_S: Final = 10.0
PURGE_TIMEOUT_S: Final = 60.0
WATCH_S: Final = 60.0

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
        self._opened: dict[NamespaceId, tuple[NamespaceSpec, str]] = {}
        self._peers = Peers(topology.weights(), {t.shard: t for t in transports}, self.counters)

    @classmethod
    def in_process(
        cls, capacity_nbytes: int = 256 << 20, *, policy: str = "default", shards: int = 1
    ) -> Opening[StoreClient]:
        """A store in this process, without any network, gone when the client is closed.

        `async with StoreClient.in_process() as client:`, or await it. Holds blocks of `capacity_nbytes`
        altogether. Raises ConfigError for an unknown policy.
        """

        async def make() -> StoreClient:
            return cls.over(await start_in_process(capacity_nbytes, policy, shards))

        return Opening(make)

    @classmethod
    def connect_to(
        cls,
        addresses: Sequence[str],
        *,
        token: str | None = None,
        tls: ClientTls | None = None,
        admin: bool = False,
        limits: ClientLimits | None = None,
        shared_memory: bool = True,
    ) -> Opening[StoreClient]:
        """A client of a running store, known by the address of any of its shards (more: if that is down).

        `async with StoreClient.connect_to(["host:port"], token=...) as client:`, or await it.
        With `admin` the addresses are the admin addresses of all shards: there epochs advance, and purge
        and compaction work. `tls` names PEM files; `shared_memory` as in `connect`. Raises Unavailable when
        nobody answers, Unauthenticated for a wrong token.
        """

        async def make() -> StoreClient:
            credentials = None if tls is None else tls.channel_credentials()
            timeout_s = (limits or ClientLimits()).connect_timeout_s
            topology = await discover(addresses, token, credentials, admin=admin, timeout_s=timeout_s)
            return await cls.connect(
                topology, token=token, credentials=credentials, limits=limits, shared_memory=shared_memory
            )

        return Opening(make)

    @classmethod
    def connect_running(
        cls,
        name: str = "default",
        *,
        admin: bool = False,
        limits: ClientLimits | None = None,
        shared_memory: bool = True,
    ) -> Opening[StoreClient]:
        """A client of the store that `kvstrata store` runs on this machine, of the same user.

        Addresses and token are read from its file (store_file.py). Raises Unavailable where none runs.
        """

        async def make() -> StoreClient:
            file = StoreFile.read(StoreFolder.of(name).file)
            return await cls.connect(
                file.topology(admin=admin),
                token=file.token(),
                tls=file.client_tls(),
                limits=limits,
                shared_memory=shared_memory,
            )

        return Opening(make)

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
        self._opened[ids[0]] = (spec, tenant)
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

    # -- what all shards are asked -----------------------------------------------------------------

    async def register_epoch(
        self, model_id: str, epoch: Epoch, *, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> dict[ShardId, None]:
        """Bind an epoch's number to its weights, for ever. `open` does so for the epoch it is given.

        Raises EpochConflict when the number stands for other weights, Incomplete when not all shards did it.
        """
        return await everywhere(
            self._peers,
            f"registering epoch {epoch.number} of {model_id}",
            lambda t: t.register_epoch(model_id, epoch, timeout_s=timeout_s),
        )

    async def advance_epoch(
        self,
        model_id: str,
        number: int,
        policy: EpochPolicy = ISOLATE,
        *,
        timeout_s: float = ADMIN_TIMEOUT_S,
    ) -> dict[ShardId, Revision]:
        """Make a registered epoch the model's current one; older KV becomes the first to go.

        O(1) on each shard, whatever it holds. What is pinned stays. Raises EpochUnknown when the number is
        not registered, PermissionDenied where it needs the admin addresses, Incomplete when not all did it.
        """
        return await everywhere(
            self._peers,
            f"advancing {model_id} to epoch {number}",
            lambda t: t.advance_epoch(model_id, number, policy, timeout_s=timeout_s),
        )

    async def epochs(
        self, model_id: str, *, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> dict[ShardId, EpochsOfModel]:
        """What each shard knows of a model's epochs. Raises Incomplete."""
        return await everywhere(
            self._peers, f"epochs of {model_id}", lambda t: t.epochs(model_id, timeout_s=timeout_s)
        )

    async def namespaces(
        self, *, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> dict[ShardId, tuple[KnownNamespace, ...]]:
        """Which namespaces are open on each shard, of all tenants. Raises Incomplete."""
        return await everywhere(self._peers, "namespaces", lambda t: t.namespaces(timeout_s=timeout_s))

    async def try_status(self) -> dict[ShardId, ShardStatus | KVStrataError]:
        """What each shard says of itself, or why it does not."""
        return await each(self._peers, lambda t: t.status(timeout_s=self._limits.status_timeout_s))

    async def try_namespaces(self) -> dict[ShardId, tuple[KnownNamespace, ...] | KVStrataError]:
        """As `namespaces`, of whoever answers."""
        return await each(self._peers, lambda t: t.namespaces(timeout_s=self._limits.status_timeout_s))

    async def purge(
        self,
        namespace: NamespaceId,
        *,
        keys: Sequence[BlockKey] | None = None,
        epoch: int | None = None,
        timeout_s: float = PURGE_TIMEOUT_S,
    ) -> dict[ShardId, Purged]:
        """Delete for good: of a namespace everything, only these keys, or only one epoch.

        When this returns no match sees it, on no later day. What is pinned is freed with its pins. Raises
        PermissionDenied where it needs the admin addresses, Incomplete when not all shards did it.
        """
        chosen = None if keys is None else tuple(keys)
        return await everywhere(
            self._peers,
            f"purging {namespace.hex()}",
            lambda t: purge_on(t, namespace, chosen, epoch, timeout_s),
        )

    async def compact(
        self, revisions: Mapping[ShardId, Revision] | None = None, *, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> dict[ShardId, Revision]:
        """Forget the history before a revision of each shard (None: before now); the horizons from here on.

        Snapshots and watches below are answered Compacted. Raises PermissionDenied and Incomplete as `purge`.
        """
        return await everywhere(self._peers, "compaction", lambda t: compact_on(t, revisions, timeout_s))

    def listing(
        self,
        namespace: NamespaceId,
        *,
        at: Mapping[ShardId, Revision] | None = None,
        timeout_s: float = ADMIN_TIMEOUT_S,
    ) -> AsyncIterator[Page]:
        """What the shards hold of a namespace, page by page, at the latest revision of each or as of `at`.

        Raises Incomplete after the last page when a shard failed; Compacted is among the reasons.
        """
        return listing(self._peers, namespace, at or {}, timeout_s)

    def watch(
        self,
        namespaces: Sequence[NamespaceId],
        *,
        after: Mapping[ShardId, Revision] | None = None,
        for_s: float = WATCH_S,
    ) -> Watch:
        """Changes of all shards, for `for_s` seconds: from now on, or after what a former watch has `seen`.

        `async with client.watch([session.namespace]) as watch: async for event in watch: ...`, see
        merged_watch.py for the events. Shards that join the topology later need a watch of their own.
        """
        return Watch(self._peers, namespaces, after, self._reopen_namespaces(namespaces), for_s)

    def _reopen_namespaces(self, namespaces: Sequence[NamespaceId]) -> Reopen:
        known = [self._opened[namespace] for namespace in namespaces if namespace in self._opened]

        async def reopen(transport: ShardTransport) -> None:
            for spec, tenant in known:
                await transport.open_namespace(spec, tenant, timeout_s=self._limits.connect_timeout_s)

        return reopen

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
