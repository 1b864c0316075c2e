"""The server's side of the wire: requests in, the shard's answers out, errors by name.

Any `ShardTransport` can stand behind it; in production it is the driver. One service has two faces: the
listener of everybody's calls, and the admin's, where only the cluster's token counts and no bytes move.
Calls that wait, streams, watches and pipelines are admitted against a number each, bytes of writes in flight
against a budget: beyond them the shard says RESOURCE_EXHAUSTED rather than queueing.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog

from kvstore import trace
from kvstore.access import TRUSTED, Caller, Callers, NamespaceOwners, text_in
from kvstore.errors import (
    KVStrataError,
    OverLimit,
    PermissionDenied,
    Unavailable,
)
from kvstore.tls import peer_names
from kvstore.transport.base import ShardTransport
from kvstore.transport.grpc import bulk, faults, methods
from kvstore.transport.grpc.blocks_service import BlocksService
from kvstore.transport.grpc.calls import Context, left
from kvstore.transport.grpc.control_service import Call, ControlService, Served
from kvstore.transport.grpc.pipeline_service import PipelineStream
from kvstore.transport.grpc.watch_service import Watches
from kvstore.v1 import blocks_pb2 as blocks

log = structlog.get_logger(__name__)

RETRY_AFTER_S: Final = 0.05
Work = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one shard works on at once, over all its connections."""

    inflight_nbytes_max: int = 512 << 20  # of writes that arrived and are not stored yet
    streams_max: int = 128  # bulk streams
    waiting_max: int = 256  # calls that do more than ask the core
    pipelines_max: int = 256
    watches_max: int = 64


class ShardService:
    def __init__(
        self, shard: ShardTransport, limits: ServiceLimits | None = None, callers: Callers | None = None
    ) -> None:
        self._shard = shard
        self._limits = limits or ServiceLimits()
        self._callers = callers or Callers(None)
        self._owners = NamespaceOwners()
        self.control = ControlService(shard, self._owners)
        self.watches = Watches(shard, self.control, self._limits.watches_max)
        self._pipelines: set[PipelineStream] = set()
        self._draining = False
        self._waiting = 0
        self.blocks = BlocksService(shard, self._limits.inflight_nbytes_max, self._limits.streams_max)

    def handlers(self, *, admin: bool = False) -> list[grpc.GenericRpcHandler]:
        """Of everybody's listener, or of the admin's: the control plane alone, for the cluster's token."""
        by_service: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        for method, served in self.control.served.items():
            made: Any = grpc.unary_unary_rpc_method_handler(self._unary(served, admin))
            by_service.setdefault(method.service, {})[method.name] = made
        by_service[methods.CONTROL] |= {
            methods.WATCH.name: grpc.unary_stream_rpc_method_handler(self._watch(admin)),
            methods.PIPELINE.name: grpc.stream_stream_rpc_method_handler(self._pipeline(admin)),
        }
        if not admin:
            by_service[methods.BLOCKS] = {
                methods.READ.name: grpc.unary_stream_rpc_method_handler(
                    self._checked_read, methods.READ.asked.FromString
                ),
                methods.WRITE.name: grpc.stream_unary_rpc_method_handler(
                    self._checked_write, bulk.parse_write, methods.WRITE.answer.SerializeToString
                ),
            }
        return [grpc.method_handlers_generic_handler(name, made) for name, made in by_service.items()]

    def drain(self) -> None:
        """End the streams that have no end of their own; their clients go on elsewhere."""
        self._draining = True
        self.watches.drain()
        for stream in self._pipelines:
            stream.drain()

    # -- the control plane -------------------------------------------------------------------------

    def _unary(self, served: Served, admin: bool) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def answer(request: bytes, call: Call) -> bytes:
            if not served.waits:
                return await served.answer(request, call)
            with self._place():
                return await served.answer(request, call)

        async def answered(request: bytes, context: Context) -> Any:
            return await self._guarded(context, lambda call: answer(request, call), admin=admin)

        return answered

    def _watch(self, admin: bool) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def watched(request: bytes, context: Context) -> Any:
            work = lambda call: self.watches.serve(request, context, call)  # noqa: E731
            return await self._guarded(context, work, admin=admin)

        return watched

    def _pipeline(self, admin: bool) -> Callable[[Any, Context], Awaitable[Any]]:
        async def run(context: Context, call: Call) -> None:
            if self._draining:
                raise Unavailable("the shard drains: ask the topology who takes over")
            if len(self._pipelines) >= self._limits.pipelines_max:
                taken = f"{len(self._pipelines)} pipelines are open on this shard"
                raise OverLimit(taken, retry_after_s=RETRY_AFTER_S)
            stream = PipelineStream(self.control.pipelined, context, call.caller, self._place, admin=admin)
            self._pipelines.add(stream)
            try:
                await stream.run()
            finally:
                self._pipelines.discard(stream)

        async def piped(_: Any, context: Context) -> Any:
            return await self._guarded(context, lambda call: run(context, call), admin=admin)

        return piped

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the calls that wait. Raises OverLimit when all are taken."""
        if self._waiting >= self._limits.waiting_max:
            raise OverLimit(f"{self._waiting} calls wait on this shard", retry_after_s=RETRY_AFTER_S)
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _guarded(self, context: Context, work: Work, *, admin: bool = False) -> Any:
        """Find out who calls, bind the trace, and end the call as errors.py's tree says.

        Loggers print the locals of a traceback's frames: no token may be one of them here.
        """
        traced = trace.checked(_metadata_of(context, trace.TRACE_METADATA))
        with structlog.contextvars.bound_contextvars(**({"traceparent": traced} if traced else {})):
            try:
                return await work(Call(self._caller(context, admin), left(context), admin))
            except KVStrataError as error:
                code = grpc.StatusCode[type(error).status]
                return await context.abort(code, str(error), faults.metadata_of(error))
            except grpc.aio.InternalError:
                return None  # gRPC's word for a peer that left while we wrote to it
            except Exception:
                log.exception("a call failed")
                return await context.abort(grpc.StatusCode.INTERNAL, faults.INTERNAL_DETAIL)

    def _caller(self, context: Context, admin: bool) -> Caller:
        names = peer_names(context.auth_context()) if self._callers.take_certificates else ()
        caller = self._callers.identify(_metadata_of(context, "authorization"), names)
        if admin and caller != TRUSTED:
            raise PermissionDenied("this is the admin's port: show the cluster's token")
        return caller

    # -- the data plane ----------------------------------------------------------------------------

    async def _checked_read(self, asked: blocks.ReadRequest, context: Context) -> Any:
        async def read(call: Call) -> None:
            self.control.namespace(asked.namespace_id, call.caller)
            await self.blocks.read(asked, context)

        return await self._guarded(context, read)

    async def _checked_write(self, chunks: AsyncIterator[bulk.WriteChunk], context: Context) -> Any:
        return await self._guarded(context, lambda _: self.blocks.write(chunks, context))


def _metadata_of(context: Context, name: str) -> str:
    """One entry of the call's metadata; empty where there is none."""
    return text_in(context.invocation_metadata(), name)
