"""A worker's way to the store: one client, a session per tenant, both made when they are first needed.

The store may be down when a worker starts, or go away later: `session` then answers None at once, the caller
computes everything itself, and every `retry_s` (doubling up to `retry_s_max`) one caller tries again, within
`connect_timeout_s`. Once open, a session outlives its shards: it turns their absence into misses by itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from engine.background import Background
from engine.parallel.session import RankedSession, Session
from kvstore.client import StoreClient
from kvstore.clock import Clock
from kvstore.errors import EpochConflict, Incomplete, KVStrataError, Unavailable
from kvstore.merged_watch import Watch
from kvstore.nouns import (
    Epoch,
    EpochsOfModel,
    LeaseId,
    NamespaceId,
    NamespaceSpec,
    Quality,
    Revision,
    ShardId,
)
from kvstore.topology import Topology

__all__ = ["Connect", "Leases", "StoreLink"]

Connect = Callable[[Topology], Awaitable[StoreClient]]
Leases = Sequence[tuple[ShardId, LeaseId]]

TENANTS_MAX = 256

log = structlog.get_logger(__name__)


class StoreLink:
    """One event loop's. `counters` has "store:open_failed"; the client's own are in `client_counters`."""

    def __init__(
        self,
        connect: Connect,
        topology: Topology,
        spec: NamespaceSpec,
        epoch: Epoch,
        background: Background,
        clock: Clock,
        *,
        min_quality: Quality = Quality.LOSSLESS,
        stale_lag_max: int = 0,
        other_ranks: Sequence[NamespaceSpec] = (),
        connect_timeout_s: float = 5.0,
        retry_s: float = 1.0,
        retry_s_max: float = 15.0,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.spec = spec
        self._specs = (spec, *other_ranks)
        self.epoch = epoch
        self._connect = connect
        self._topology = topology
        self._background = background
        self._clock = clock
        self._min_quality, self._stale_lag_max = min_quality, stale_lag_max
        self._connect_timeout_s = connect_timeout_s
        self._retry_s, self._retry_s_max = retry_s, retry_s_max
        self._delay_s = retry_s
        self._not_before = clock.now()
        self._opening = asyncio.Lock()
        self._client: StoreClient | None = None
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    @property
    def client_counters(self) -> Counter[str]:
        return Counter() if self._client is None else self._client.counters

    async def session(self, tenant: str) -> Session | None:
        """The tenant's session. None: the store is not reachable now. Bounded by `connect_timeout_s`."""
        session = self._sessions.get(tenant)
        if session is not None:
            self._sessions.move_to_end(tenant)
            return session
        if self._failing and self._opening.locked():
            return None  # somebody tries again: do not queue up behind a store that may be dead
        async with self._opening:
            if (session := self._sessions.get(tenant)) is not None:
                return session
            return await self._open(tenant) if self._clock.now() >= self._not_before else None

    async def check_epoch(self, epoch: Epoch) -> None:
        """Raises EpochConflict when the number of an epoch to come stands for other weights on a shard that
        answers within `connect_timeout_s`. Binds nothing; what does not answer now is found by
        `sessions_of`."""
        if self._client is None:
            return
        model_id, timeout_s = self.spec.model_id, self._connect_timeout_s
        known: Mapping[ShardId, object] = {}
        try:
            known = await self._client.epochs(model_id, timeout_s=timeout_s)
        except KVStrataError as error:
            known = error.done if isinstance(error, Incomplete) else {}
            log.warning("not every shard could be asked for the epoch to come", error=str(error))
        for shard, of_model in known.items():
            bound = of_model.registered if isinstance(of_model, EpochsOfModel) else ()
            for other in bound:
                if other.number == epoch.number and other != epoch:
                    raise EpochConflict(
                        f"epoch {epoch.number} of {model_id} is bound to weights {other.weights_digest.hex()}"
                        f" on shard {shard}, not to {epoch.weights_digest.hex()}: take the next number for "
                        "new weights"
                    )

    async def sessions_of(self, epoch: Epoch) -> dict[str, Session]:
        """Register an epoch that is to come, and open it for every tenant that has a session now: those of
        `change_epoch`. Others, and all behind a store that does not answer, are opened when they are needed.

        Raises EpochConflict when the number stands for other weights in the store."""
        sessions: dict[str, Session] = {}
        if self._client is None:
            return sessions
        try:
            for tenant in [*self._sessions]:
                async with asyncio.timeout(self._connect_timeout_s):
                    sessions[tenant] = await self._opened(self._client, tenant, epoch)
        except EpochConflict:
            raise
        except (KVStrataError, OSError) as error:
            log.warning("the store does not know the epoch to come yet", error=str(error))
        return sessions

    def change_epoch(self, epoch: Epoch, sessions: Mapping[str, Session]) -> None:
        """From here on sessions are of this epoch. Those given out before stay what they are."""
        self.epoch = epoch
        self._sessions = OrderedDict(sessions)

    async def set_topology(self, topology: Topology) -> None:
        """Move to a newer topology; and try at once again if the store was unreachable."""
        if topology.version > self._topology.version:
            self._topology = topology
            self._not_before, self._delay_s = self._clock.now(), self._retry_s
        if self._client is not None:
            await self._client.update_topology(topology)

    def watch(self, namespaces: Sequence[NamespaceId], after: Mapping[ShardId, Revision]) -> Watch | None:
        """Changes of these on all shards, resumed after what was seen. None: nothing is open yet."""
        if self._client is None or not namespaces:
            return None
        return self._client.watch(namespaces, after=after or None)

    async def epochs(self) -> dict[ShardId, EpochsOfModel]:
        """What each shard knows of our model's. Raises Incomplete, or Unavailable before anything is open."""
        if self._client is None:
            raise Unavailable("the store was not reached yet: ask after a session is open")
        return await self._client.epochs(self.spec.model_id)

    @property
    def _failing(self) -> bool:
        return self._delay_s > self._retry_s

    def release(self, session: Session, leases: Leases) -> None:
        """Drop leases in the background. Those of a shard that is away expire by themselves."""
        if leases:
            self._background.spawn(session.release(tuple(leases)), "release leases")

    def release_for(self, tenant: str, leases: Leases) -> None:
        """As `release`, for leases that came from elsewhere: with a handoff."""
        if leases:
            self._background.spawn(self._release_for(tenant, leases), "release leases of a handoff")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _release_for(self, tenant: str, leases: Leases) -> None:
        session = await self.session(tenant)
        if session is None:
            self.counters["store:leases_left_to_expire"] += len(leases)
        else:
            await session.release(leases)

    async def _open(self, tenant: str) -> Session | None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._client is None:
                    self._client = await self._connect(self._topology)
                epoch = self.epoch
                session = await self._opened(self._client, tenant, epoch)
        except (KVStrataError, OSError) as error:  # TimeoutError is an OSError
            self.counters["store:open_failed"] += 1
            self._not_before = self._clock.now() + self._delay_s
            log.warning("the store is not reachable", retry_s=self._delay_s, error=str(error))
            self._delay_s = min(2 * self._delay_s, self._retry_s_max)
            return None
        self._delay_s = self._retry_s
        if epoch != self.epoch:  # it changed meanwhile: a session for whoever asked, and for nobody else
            return session
        self._sessions[tenant] = session
        if len(self._sessions) > TENANTS_MAX:
            self._sessions.popitem(last=False)
        return session

    async def _opened(self, client: StoreClient, tenant: str, epoch: Epoch) -> Session:
        ranks = [
            await client.open(
                spec,
                epoch,
                tenant=tenant,
                min_quality=self._min_quality,
                stale_lag_max=self._stale_lag_max,
            )
            for spec in self._specs
        ]
        return RankedSession(ranks) if len(ranks) > 1 else ranks[0]
