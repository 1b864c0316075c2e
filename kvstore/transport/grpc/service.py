"""The server's side of the wire: requests in, the shard's answers out, errors by name.

Any `ShardTransport` can stand behind it; in production it is the driver. Bytes of writes in flight are
admitted against a budget, and streams against a number: beyond them the shard says RESOURCE_EXHAUSTED
rather than queueing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import structlog

from kvstore.errors import (
    ConfigError,
    DeadlineExceeded,
    KVStrataError,
    OverLimit,
    WireVersionMismatch,
)
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockRef, Incarnation, LeaseId, TxnId
from kvstore.topology import Topology
from kvstore.transport.base import CHUNK_NBYTES, REQUEST_ID_NBYTES, WIRE_VERSIONS_READ, ShardTransport
from kvstore.transport.grpc import bulk, methods, wire
from kvstore.transport.grpc.methods import Method
from kvstore.v1 import blocks_pb2 as blocks
from kvstore.v1 import control_pb2 as control
from kvstore.v1 import topology_pb2 as topology

log = structlog.get_logger(__name__)

TIMEOUT_S_MAX: Final = 60.0  # for a caller that set no deadline
Context = Any  # grpc.aio.ServicerContext: its generics say nothing here


class ShardService:
    def __init__(self, shard: ShardTransport, inflight_nbytes_max: int, streams_max: int) -> None:
        self._shard = shard
        self._inflight_nbytes_max = inflight_nbytes_max
        self._inflight_nbytes = 0
        self._streams_max = streams_max
        self._streams = 0
        self.topology = Topology(0, ())

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        unary: dict[Method[Any, Any], Callable[[Any, Context], Awaitable[Any]]] = {
            methods.HELLO: self._hello,
            methods.OPEN_NAMESPACE: self._open_namespace,
            methods.REGISTER_EPOCH: self._register_epoch,
            methods.ADVANCE_EPOCH: self._advance_epoch,
            methods.MATCH: self._match,
            methods.RENEW: self._renew,
            methods.RELEASE: self._release,
            methods.BEGIN: self._begin,
            methods.COMMIT: self._commit,
            methods.ABORT: self._abort,
            methods.REPORT: self._report,
            methods.STATUS: self._status,
            methods.GET_TOPOLOGY: self._get_topology,
        }
        by_service: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        for method, answer in unary.items():
            made = grpc.unary_unary_rpc_method_handler(_named_errors(answer), **method.handler_codec())
            by_service.setdefault(method.service, {})[method.name] = made
        by_service[methods.BLOCKS] = {
            methods.READ.name: grpc.unary_stream_rpc_method_handler(
                _named_errors(self._read), methods.READ.asked.FromString
            ),
            methods.WRITE.name: grpc.stream_unary_rpc_method_handler(
                _named_errors(self._write), bulk.parse_write, methods.WRITE.answer.SerializeToString
            ),
        }
        return [grpc.method_handlers_generic_handler(name, made) for name, made in by_service.items()]

    async def _hello(self, asked: control.HelloRequest, context: Context) -> control.HelloResponse:
        common = WIRE_VERSIONS_READ.intersection(asked.wire_versions)
        if not common:
            raise WireVersionMismatch(
                f"the client speaks wire versions {list(asked.wire_versions)}, this shard "
                f"{sorted(WIRE_VERSIONS_READ)}: upgrade the older one"
            )
        own = await self._shard.hello(timeout_s=_left(context))
        return control.HelloResponse(
            wire_version=max(common),
            disk_version=own.disk_version,
            shard=own.shard,
            incarnation=own.incarnation,
        )

    async def _open_namespace(self, asked: Any, context: Context) -> control.OpenNamespaceResponse:
        opened = await self._shard.open_namespace(wire.spec_in(asked), asked.tenant, timeout_s=_left(context))
        return control.OpenNamespaceResponse(namespace_id=opened)

    async def _register_epoch(self, asked: Any, context: Context) -> control.RegisterEpochResponse:
        epoch = wire.epoch_in(asked.epoch)
        await self._shard.register_epoch(asked.model_id, epoch, timeout_s=_left(context))
        return control.RegisterEpochResponse()

    async def _advance_epoch(self, asked: Any, context: Context) -> control.AdvanceEpochResponse:
        revision = await self._shard.advance_epoch(asked.model_id, asked.number, timeout_s=_left(context))
        return control.AdvanceEpochResponse(revision=wire.revision_out(revision))

    async def _match(self, asked: Any, context: Context) -> control.MatchResponse:
        result = await self._shard.match(
            wire.snapshot_in(asked),
            wire.split_keys(asked.keys),
            wire.owner_in(asked.owner),
            asked.lease_ms / 1000,
            timeout_s=_left(context),
        )
        return wire.match_result_out(result)

    async def _renew(self, asked: Any, context: Context) -> control.RenewResponse:
        leases = [LeaseId(lease) for lease in asked.leases]
        held = await self._shard.renew(leases, asked.lease_ms / 1000, timeout_s=_left(context))
        return control.RenewResponse(held=held)

    async def _release(self, asked: Any, context: Context) -> control.ReleaseResponse:
        await self._shard.release([LeaseId(lease) for lease in asked.leases], timeout_s=_left(context))
        return control.ReleaseResponse()

    async def _begin(self, asked: Any, context: Context) -> control.BeginResponse:
        opened = await self._shard.begin(
            wire.namespace_in(asked.namespace_id),
            wire.epoch_in(asked.epoch),
            wire.quality_in(asked.quality),
            wire.offers_in(asked),
            wire.owner_in(asked.owner),
            asked.lease_ms / 1000,
            wire.fixed(asked.request_id, REQUEST_ID_NBYTES, "request_id"),
            timeout_s=_left(context),
        )
        return control.BeginResponse(txn=opened.txn, refusals=wire.refusals_out(opened.outcomes))

    async def _commit(self, asked: Any, context: Context) -> control.CommitResponse:
        pin_for_s = asked.pin_for_ms / 1000 or None
        return wire.commit_out(
            await self._shard.commit(TxnId(asked.txn), pin_for_s, timeout_s=_left(context))
        )

    async def _abort(self, asked: Any, context: Context) -> control.AbortResponse:
        await self._shard.abort(TxnId(asked.txn), timeout_s=_left(context))
        return control.AbortResponse()

    async def _report(self, asked: Any, context: Context) -> control.ReportResponse:
        return control.ReportResponse(
            retired=await self._shard.report(
                wire.namespace_in(asked.namespace_id), self._refs(asked), timeout_s=_left(context)
            )
        )

    async def _status(self, asked: Any, context: Context) -> control.StatusResponse:
        return wire.status_out(await self._shard.status(timeout_s=_left(context)))

    async def _get_topology(self, asked: Any, context: Context) -> topology.GetTopologyResponse:
        return topology.GetTopologyResponse(topology=wire.topology_out(self.topology))

    async def _read(self, asked: blocks.ReadRequest, context: Context) -> None:
        async with self._stream(context):
            async for chunk in self._chunks(asked, context):
                await context.write(chunk)

    async def _chunks(self, asked: blocks.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        namespace = wire.namespace_in(asked.namespace_id)
        async for item in self._shard.read(namespace, self._refs(asked), timeout_s=_left(context)):
            if item.frame is None:
                miss = item.miss.value if item.miss else ""
                yield bulk.pack_miss(item.index, miss)
                continue
            nbytes = item.frame.nbytes
            for start in range(0, nbytes, CHUNK_NBYTES):
                yield bulk.pack_read(item.index, nbytes, item.frame[start : start + CHUNK_NBYTES])

    async def _write(self, chunks: AsyncIterator[bulk.WriteChunk], context: Context) -> blocks.WriteResponse:
        async with self._stream(context):
            return await self._store(chunks, context)

    @contextlib.asynccontextmanager
    async def _stream(self, context: Context) -> AsyncIterator[None]:
        """A place among the streams, held no longer than the call may take, whatever the peer does.

        Raises OverLimit when all are taken, so that there is always room for calls without bytes.
        """
        if self._streams >= self._streams_max:
            raise OverLimit(f"{self._streams} streams are open on this shard: try again later")
        limit_s = _left(context)
        self._streams += 1
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"the stream was not done within {limit_s:.1f} s") from None
        finally:
            self._streams -= 1

    async def _store(self, chunks: AsyncIterator[bulk.WriteChunk], context: Context) -> blocks.WriteResponse:
        answer = blocks.WriteResponse()
        frame, filled = bytearray(), 0
        try:
            async for chunk in chunks:
                if not filled:
                    frame = self._admit_frame(chunk.frame_nbytes)
                end = filled + len(chunk.data)
                if end > len(frame) or not chunk.data:
                    raise ConfigError("chunks run past the frame they announced: send frames in order")
                frame[filled:end] = chunk.data
                filled = end
                if filled == len(frame):
                    view = memoryview(frame)
                    piece = (chunk.index, bytes(view[:HEADER_NBYTES]), view[HEADER_NBYTES:])
                    (refusal,) = await self._shard.write(TxnId(chunk.txn), [piece], timeout_s=_left(context))
                    answer.indexes.append(chunk.index)
                    answer.refusals.append(refusal.value if refusal else "")
                    self._inflight_nbytes -= len(frame)
                    frame, filled = bytearray(), 0
        finally:
            self._inflight_nbytes -= len(frame)
        return answer

    def _admit_frame(self, nbytes: int) -> bytearray:
        """A buffer within the budget; whoever takes it gives `len` back.

        Raises ConfigError for a nonsense size, OverLimit beyond the budget.
        """
        if nbytes <= HEADER_NBYTES:
            raise ConfigError(f"a frame of {nbytes} bytes has no room for a header and a payload")
        if self._inflight_nbytes + nbytes > self._inflight_nbytes_max:
            raise OverLimit(f"{self._inflight_nbytes} bytes of writes are in flight: try again later")
        frame = bytearray(nbytes)
        self._inflight_nbytes += nbytes
        return frame

    def _refs(self, asked: blocks.ReadRequest | control.ReportRequest) -> list[BlockRef]:
        if len(asked.slots) != len(asked.generations):
            raise ConfigError(f"{len(asked.slots)} slots and {len(asked.generations)} generations: one each")
        incarnation = Incarnation(asked.incarnation)
        columns = zip(asked.slots, asked.generations, strict=True)
        return [BlockRef(self._shard.shard, incarnation, slot, generation) for slot, generation in columns]


def _left(context: Context) -> float:
    remaining = context.time_remaining()
    return TIMEOUT_S_MAX if remaining is None else min(remaining, TIMEOUT_S_MAX)


def _named_errors(
    answer: Callable[[Any, Context], Awaitable[Any]],
) -> Callable[[Any, Context], Awaitable[Any]]:
    """Errors of our tree end the call with their status and their name in the trailing metadata."""

    async def answered(asked: Any, context: Context) -> Any:
        try:
            return await answer(asked, context)
        except KVStrataError as error:
            return await _abort_named(context, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("a call failed", method=getattr(answer, "__name__", "?"))
            await context.abort(grpc.StatusCode.INTERNAL, "the shard failed: see its log")

    return answered


async def _abort_named(context: Context, error: KVStrataError) -> None:
    code = grpc.StatusCode[type(error).status]
    await context.abort(code, str(error), ((wire.ERROR_METADATA, type(error).__name__),))
