"""A shard's gRPC server: binds, checks who calls, reports health, drains, stops.

Two listeners. Everybody's is on loopback unless TLS files are configured or `insecure` is said aloud. The
admin's serves what deletes or changes for all (advancing an epoch, purging, compacting), beside the rest of
the control plane, to the cluster's token alone, on a port of its own. A call without a token that is known is
refused before its body is read. While draining, health is NOT_SERVING, watches and pipelines end, and calls
that run may finish within the grace.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvstore.access import Callers, Tenant, text_in
from kvstore.errors import ConfigError, Unauthenticated
from kvstore.tls import TlsFiles
from kvstore.topology import Topology
from kvstore.transport.base import ShardTransport
from kvstore.transport.grpc import faults, methods
from kvstore.transport.grpc.options import server_options
from kvstore.transport.grpc.service import ServiceLimits, ShardService
from kvstore.transport.shm.server import shared_memory

__all__ = ["ServerConfig", "ShardServer", "TlsFiles", "is_loopback"]

ADMIN_CALLS_MAX = 16


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    admin_host: str = "127.0.0.1"
    admin_port: int = 0
    token: str | None = field(default=None, repr=False)  # the cluster's: the trusted role
    tenants: tuple[Tenant, ...] = ()
    tls: TlsFiles | None = None
    insecure: bool = False  # allow a listener beyond loopback without TLS
    concurrent_calls_max: int = 256
    pipelines_max: int = 256  # clients with control calls under way
    watches_max: int = 64
    inflight_nbytes_max: int = 512 << 20  # of writes that arrived and are not stored yet

    def __post_init__(self) -> None:
        for host in (self.host, self.admin_host):
            if not (is_loopback(host) or self.tls or self.insecure):
                raise ConfigError(
                    f"{host} is not a loopback address: configure TLS (cert, key), "
                    "or say insecure = true if the network is yours alone"
                )
        if not is_loopback(self.admin_host) and not self.token:
            raise ConfigError(f"an admin listener on {self.admin_host} needs the cluster's token")
        Callers(self.token, self.tenants)
        if any(tenant.certificate for tenant in self.tenants) and not (self.tls and self.tls.ca):
            raise ConfigError(
                "a tenant's certificate is only seen with mTLS: give the shards cert, key and ca"
            )

    def limits(self) -> ServiceLimits:
        return ServiceLimits(
            inflight_nbytes_max=self.inflight_nbytes_max,
            streams_max=max(1, self.concurrent_calls_max // 2),  # the other half is for calls without bytes
            waiting_max=self.concurrent_calls_max,
            pipelines_max=self.pipelines_max,
            watches_max=self.watches_max,
        )


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
        self._callers = Callers(config.token, config.tenants)
        self._service = ShardService(shard, config.limits(), self._callers)
        may_share = config.token is not None or not config.tenants  # whoever maps the arena reads all of it
        self._shm = shared_memory(shard, config.token) if may_share else None
        self._health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self.admin_address = ""

    async def start(self) -> str:
        """Bind and serve both listeners; the address clients use (`admin_address` is the other one).

        Raises ConfigError when a port is taken, or TLS files cannot be read.
        """
        config = self._config
        calls_max = config.concurrent_calls_max + config.pipelines_max + config.watches_max
        try:
            address = await self._listen(config.host, config.port, calls_max, admin=False)
            self.admin_address = await self._listen(
                config.admin_host, config.admin_port, ADMIN_CALLS_MAX, admin=True
            )
        except ConfigError:
            await self.stop(0)
            raise
        if self._shm is not None:
            self._shm.start()
            self._service.control.shm_socket = self._shm.name.lstrip("\0")
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return address

    def set_topology(self, topology: Topology) -> None:
        """What GetTopology answers from here on, unless it is older than what is known."""
        if topology.version > self._service.control.topology.version:
            self._service.control.topology = topology

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, end watches and pipelines, let running calls finish within `grace_s`, then cut
        them off."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._service.drain()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        if self._shm is not None:
            await self._shm.stop()

    async def _listen(self, host: str, port: int, calls_max: int, *, admin: bool) -> str:
        server = grpc.aio.server(
            interceptors=[_CallerCheck(self._callers)],
            options=server_options(),
            maximum_concurrent_rpcs=calls_max,
        )
        self._servers.append(server)
        server.add_generic_rpc_handlers(self._service.handlers(admin=admin))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        wanted = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._config.tls:
                bound = server.add_secure_port(wanted, self._config.tls.server_credentials())
            else:
                bound = server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {wanted}: {error}; choose another port") from None
        await server.start()
        return f"{wanted.rpartition(':')[0]}:{bound}"

    async def _set_health(self, status: Any) -> None:
        for name in ("", methods.CONTROL, methods.BLOCKS, methods.TOPOLOGY):
            await self._health.set(name, status)


class _CallerCheck(grpc.aio.ServerInterceptor):
    """Refuses an unknown token before a body is read; the health service answers anyone. A certificate is
    only seen by the call itself: where tenants have some, a call without a token is let through to that."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers
        self._refuse: Any = grpc.unary_unary_rpc_method_handler(_unauthenticated)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method.startswith("/grpc.health.v1.Health/"):
            return await continuation(details)
        shown = text_in(details.invocation_metadata, "authorization")
        by_certificate = not shown and self._callers.take_certificates
        if by_certificate or self._callers.by_token(shown) is not None:
            return await continuation(details)
        return self._refuse


async def _unauthenticated(asked: Any, context: Any) -> None:
    error = Unauthenticated("show the cluster's token, or a tenant's")
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error), faults.metadata_of(error))
