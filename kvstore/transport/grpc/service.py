"""The server's side of the wire: requests in, the shard's answers out, errors by name.

Any `ShardTransport` can stand behind it; in production it is the driver. The bulk streams are in
blocks_service.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from kvstore.errors import (
    KVStrataError,
    WireVersionMismatch,
)
from kvstore.nouns import LeaseId, TxnId
from kvstore.topology import Topology
from kvstore.transport.base import REQUEST_ID_NBYTES, WIRE_VERSIONS_READ, ShardTransport
from kvstore.transport.grpc import bulk, methods, wire
from kvstore.transport.grpc.blocks_service import BlocksService, refs_in
from kvstore.transport.grpc.calls import Context
from kvstore.transport.grpc.calls import left as _left
from kvstore.transport.grpc.methods import Method
from kvstore.v1 import control_pb2 as control
from kvstore.v1 import topology_pb2 as topology

log = structlog.get_logger(__name__)


class ShardService:
    def __init__(self, shard: ShardTransport, inflight_nbytes_max: int, streams_max: int) -> None:
        self._shard = shard
        self.blocks = BlocksService(shard, inflight_nbytes_max, streams_max)
        self.topology = Topology(0, ())
        self.shm_socket = ""

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
                _named_errors(self.blocks.read), methods.READ.asked.FromString
            ),
            methods.WRITE.name: grpc.stream_unary_rpc_method_handler(
                _named_errors(self.blocks.write), bulk.parse_write, methods.WRITE.answer.SerializeToString
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
            shm_socket=self.shm_socket,
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
                wire.namespace_in(asked.namespace_id),
                refs_in(self._shard.shard, asked),
                timeout_s=_left(context),
            )
        )

    async def _status(self, asked: Any, context: Context) -> control.StatusResponse:
        return wire.status_out(await self._shard.status(timeout_s=_left(context)))

    async def _get_topology(self, asked: Any, context: Context) -> topology.GetTopologyResponse:
        return topology.GetTopologyResponse(topology=wire.topology_out(self.topology))


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
