"""A home shard as a Ray actor: the driver, its host tier and its gRPC server in one process.

The only file of the store that knows Ray. Blocks never travel through Ray's object store; actor calls carry
control values of our own cluster only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import kvstore.polling  # noqa: F401 - before anything that imports grpc
from kvstore.config import StoreConfig
from kvstore.memory import keep_freed_buffers
from kvstore.nouns import ISOLATE, Epoch, ShardId
from kvstore.server import ShardServer
from kvstore.starting import new_driver
from kvstore.topology import Topology
from kvstore.transport.base import ShardStatus

try:
    import ray
except ImportError as error:
    raise ImportError("a shard as an actor needs Ray: pip install 'kvstrata[serve]'") from error

STATUS_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ShardStart:
    """What one shard is started with."""

    shard: ShardId
    store: StoreConfig
    cluster_secret: bytes = field(repr=False)
    token: str | None = field(default=None, repr=False)


class KVShard:
    """One home shard. Async: Ray runs its methods on one event loop, the driver's own."""

    async def start(self, start: ShardStart) -> str:
        """Serve; the address clients use. Raises ConfigError when it may not or cannot listen."""
        keep_freed_buffers()
        self._driver = new_driver(start.store, start.shard, start.cluster_secret)
        self._server = ShardServer(self._driver, start.store.server(start.token))
        await self._driver.start()
        return _advertised(await self._server.start())

    async def admin_address(self) -> str:
        """Where the shard takes admins' calls: loopback, unless configured. Valid once started."""
        return self._server.admin_address

    async def set_topology(self, topology: Topology) -> None:
        self._server.set_topology(topology)

    async def status(self) -> ShardStatus:
        return await self._driver.status(timeout_s=STATUS_TIMEOUT_S)

    async def flip_stored_byte(self) -> str | None:
        """Break one stored block on purpose; its key in hex. Raises ConfigError unless store.faults."""
        key = self._driver.flip_stored_byte()
        return key.hex() if key else None

    async def advance_epoch(self, model_id: str, epoch: Epoch) -> None:
        """Bind the number, and make it the model's current one (isolate). Raises EpochConflict."""
        await self._driver.register_epoch(model_id, epoch, timeout_s=STATUS_TIMEOUT_S)
        await self._driver.advance_epoch(model_id, epoch.number, ISOLATE, timeout_s=STATUS_TIMEOUT_S)

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING, let running calls finish, stop listening."""
        await self._server.stop(grace_s)
        await self._driver.close()

    async def pid(self) -> int:
        return os.getpid()


def _advertised(address: str) -> str:
    """A listener on all interfaces is reached by the node's own address."""
    host, _, port = address.rpartition(":")
    return f"{ray.util.get_node_ip_address()}:{port}" if host in ("0.0.0.0", "[::]") else address  # noqa: S104


KVShardActor = ray.remote(num_cpus=0, max_concurrency=1000)(KVShard)
