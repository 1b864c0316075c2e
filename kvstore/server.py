"""A shard's gRPC server: binds, checks tokens, reports health, drains, stops.

It listens on loopback unless TLS files are configured or `insecure` is said aloud. A call without the
cluster's token is refused before its body is read. While draining, health is NOT_SERVING and calls that
run may finish within the grace.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvstore.errors import ConfigError
from kvstore.topology import Topology
from kvstore.transport.base import ShardTransport
from kvstore.transport.grpc import methods
from kvstore.transport.grpc.options import server_options
from kvstore.transport.grpc.service import ShardService
from kvstore.transport.shm.server import shared_memory


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one peer. With `ca`, the other side must show a certificate it signed (mTLS)."""

    cert: Path
    key: Path
    ca: Path | None = None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Raises ConfigError for a file that cannot be read."""
        pair = (_pem(self.key), _pem(self.cert))
        root = _pem(self.ca) if self.ca else None
        return grpc.ssl_server_credentials([pair], root, require_client_auth=root is not None)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    token: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None
    insecure: bool = False  # allow a listener beyond loopback without TLS
    concurrent_calls_max: int = 256
    inflight_nbytes_max: int = 512 << 20  # of writes that arrived and are not stored yet

    def __post_init__(self) -> None:
        if not (is_loopback(self.host) or self.tls or self.insecure):
            raise ConfigError(
                f"{self.host} is not a loopback address: configure TLS (cert, key), "
                "or say insecure = true if the network is yours alone"
            )


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give the path of a PEM file") from None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ShardServer:
    def __init__(self, shard: ShardTransport, config: ServerConfig) -> None:
        self._config = config
        streams_max = max(1, config.concurrent_calls_max // 2)  # the other half is for calls without bytes
        self._service = ShardService(shard, config.inflight_nbytes_max, streams_max)
        self._shm = shared_memory(shard, config.token)
        self._health = health.aio.HealthServicer()
        interceptors = [_TokenCheck(config.token)] if config.token else []
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=server_options(),
            maximum_concurrent_rpcs=config.concurrent_calls_max,
        )
        self._server.add_generic_rpc_handlers(self._service.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self) -> str:
        """Bind and serve; the address clients use. Raises ConfigError when the port is taken, or TLS files
        cannot be read."""
        config = self._config
        wanted = f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
        try:
            if config.tls:
                port = self._server.add_secure_port(wanted, config.tls.server_credentials())
            else:
                port = self._server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {wanted}: {error}; choose another port") from None
        await self._server.start()
        if self._shm is not None:
            self._shm.start()
            self._service.shm_socket = self._shm.name.lstrip("\0")
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return f"{wanted.rpartition(':')[0]}:{port}"

    def set_topology(self, topology: Topology) -> None:
        """What GetTopology answers from here on, unless it is older than what is known."""
        if topology.version > self._service.topology.version:
            self._service.topology = topology

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, let running calls finish within `grace_s`, then cut them off."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace_s)
        if self._shm is not None:
            await self._shm.stop()

    async def _set_health(self, status: Any) -> None:
        for name in ("", methods.CONTROL, methods.BLOCKS, methods.TOPOLOGY):
            await self._health.set(name, status)


class _TokenCheck(grpc.aio.ServerInterceptor):
    """Constant-time check of the bearer token; the health service answers anyone."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        self._refuse: Any = grpc.unary_unary_rpc_method_handler(_unauthenticated)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method.startswith("/grpc.health.v1.Health/"):
            return await continuation(details)
        shown = dict(details.invocation_metadata or ()).get("authorization", "")
        if hmac.compare_digest(str(shown).encode(), self._expected):
            return await continuation(details)
        return self._refuse


async def _unauthenticated(asked: Any, context: Any) -> None:
    metadata = (("kvstrata-error", "Unauthenticated"),)
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "show the cluster's token", metadata)
