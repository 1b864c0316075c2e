"""What the control plane answers: a request's bytes in, an answer's bytes out. Knows no gRPC.

Unary calls and the Pipeline share it. `waits` says of a method whether it may do more than ask the core;
one that never does is answered in the caller's own task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog
from google.protobuf.message import DecodeError

from kvstore.access import Caller, NamespaceOwners, acting_tenant
from kvstore.errors import ConfigError, PermissionDenied, WireVersionMismatch
from kvstore.nouns import LEASES_MAX, LeaseId, NamespaceId, TxnId
from kvstore.topology import Topology
from kvstore.transport.base import REQUEST_ID_NBYTES, WIRE_VERSIONS_READ, ShardTransport
from kvstore.transport.grpc import methods, wire, wire_history
from kvstore.transport.grpc.blocks_service import refs_in
from kvstore.transport.grpc.methods import Method
from kvstore.v1 import control_pb2 as control
from kvstore.v1 import topology_pb2 as topology

log = structlog.get_logger(__name__)

_NEVER_WAIT: Final = frozenset(
    {methods.MATCH, methods.RENEW, methods.RELEASE, methods.BEGIN, methods.COMMIT, methods.ABORT}
)
"""Answered by the core at once (transport/base.py's contract for the driver): a task each would be waste."""


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks, on which listener, and for how long an answer is of use."""

    caller: Caller
    timeout_s: float
    admin: bool = False  # it came in on the admin listener


Handler = Callable[[Any, Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Served:
    """One method of the table."""

    method: Method[Any, Any]
    handler: Handler
    waits: bool

    async def answer(self, request: bytes, call: Call) -> bytes:
        """Raises errors of our tree: ConfigError for bytes that are no such message, and the shard's own."""
        if self.method in methods.ADMIN and not call.admin:
            raise PermissionDenied(
                f"{self.method.name} is an admin's call: make it on the shard's admin port"
            )
        try:
            asked = self.method.asked.FromString(request)
        except DecodeError:
            raise ConfigError(f"{len(request)} bytes are no {self.method.asked.__name__}") from None
        answer: bytes = (await self.handler(asked, call)).SerializeToString()
        return answer


class ControlService:
    def __init__(self, shard: ShardTransport, owners: NamespaceOwners) -> None:
        self._shard = shard
        self._owners = owners
        self.topology = Topology(0, ())
        self.shm_socket = ""
        handlers: dict[Method[Any, Any], Handler] = {
            methods.HELLO: self._hello,
            methods.OPEN_NAMESPACE: self._open_namespace,
            methods.REGISTER_EPOCH: self._register_epoch,
            methods.ADVANCE_EPOCH: self._advance_epoch,
            methods.SHOW_EPOCHS: self._show_epochs,
            methods.SHOW_NAMESPACES: self._show_namespaces,
            methods.MATCH: self._match,
            methods.ANNOUNCE: self._announce,
            methods.RENEW: self._renew,
            methods.RELEASE: self._release,
            methods.BEGIN: self._begin,
            methods.COMMIT: self._commit,
            methods.ABORT: self._abort,
            methods.REPORT: self._report,
            methods.LIST: self._list,
            methods.PURGE: self._purge,
            methods.COMPACT: self._compact,
            methods.STATUS: self._status,
            methods.GET_TOPOLOGY: self._get_topology,
        }
        self.served = {m: Served(m, handler, m not in _NEVER_WAIT) for m, handler in handlers.items()}
        self.pipelined = {m.name: self.served[m] for m in methods.PIPELINED}

    def namespace(self, data: bytes, caller: Caller) -> NamespaceId:
        """Raises ConfigError, NotFound or PermissionDenied for one that the caller may not name."""
        namespace = wire.namespace_in(data)
        self._owners.check(caller, namespace)
        return namespace

    async def _hello(self, asked: control.HelloRequest, call: Call) -> control.HelloResponse:
        common = WIRE_VERSIONS_READ.intersection(asked.wire_versions)
        if not common:
            raise WireVersionMismatch(
                f"the client speaks wire versions {list(asked.wire_versions)[:8]}, this shard "
                f"{sorted(WIRE_VERSIONS_READ)}: upgrade the older one"
            )
        own = await self._shard.hello(timeout_s=call.timeout_s)
        return control.HelloResponse(
            wire_version=max(common),
            disk_version=own.disk_version,
            shard=own.shard,
            incarnation=own.incarnation,
            # Whoever maps the arena reads every namespace in it: that is not for tenants.
            shm_socket=self.shm_socket if call.caller.trusted else "",
        )

    async def _open_namespace(
        self, asked: control.OpenNamespaceRequest, call: Call
    ) -> control.OpenNamespaceResponse:
        spec, tenant = wire.spec_in(asked), acting_tenant(call.caller, asked.tenant)
        self._owners.admit(call.caller, spec)
        opened = await self._shard.open_namespace(spec, tenant, timeout_s=call.timeout_s)
        self._owners.opened(opened, tenant, spec)
        return control.OpenNamespaceResponse(namespace_id=opened)

    async def _register_epoch(
        self, asked: control.RegisterEpochRequest, call: Call
    ) -> control.RegisterEpochResponse:
        """A number that one tenant binds is bound for all: only who is allowed to does that."""
        epoch, model_id = wire.epoch_in(asked.epoch), wire.model_in(asked.model_id)
        if not call.caller.may_bind_epochs:
            known = await self._shard.epochs(model_id, timeout_s=call.timeout_s)
            if all(other.number != epoch.number for other in known.registered):
                raise PermissionDenied(
                    f"epoch {epoch.number} of {model_id} is not registered, and tenant {call.caller.tenant} "
                    "may not do it: ask the operator, or have them set may_bind_epochs"
                )
        await self._shard.register_epoch(model_id, epoch, timeout_s=call.timeout_s)
        return control.RegisterEpochResponse()

    async def _advance_epoch(
        self, asked: control.AdvanceEpochRequest, call: Call
    ) -> control.AdvanceEpochResponse:
        policy, model_id = wire_history.policy_in(asked), wire.model_in(asked.model_id)
        revision = await self._shard.advance_epoch(model_id, asked.number, policy, timeout_s=call.timeout_s)
        log.info("epoch advanced", model=model_id, epoch=asked.number, policy=policy)
        return control.AdvanceEpochResponse(revision=wire.revision_out(revision))

    async def _show_epochs(self, asked: control.ShowEpochsRequest, call: Call) -> control.ShowEpochsResponse:
        model_id = wire.model_in(asked.model_id)
        self._owners.check_model(call.caller, model_id)
        known = await self._shard.epochs(model_id, timeout_s=call.timeout_s)
        return wire_history.epochs_out(known)

    async def _match(self, asked: control.MatchRequest, call: Call) -> control.MatchResponse:
        snapshot = wire.snapshot_in(asked)
        self._owners.check(call.caller, snapshot.namespace)
        result = await self._shard.match(
            snapshot,
            wire.split_keys(asked.keys),
            wire.owner_in(asked.owner),
            asked.lease_ms / 1000,
            timeout_s=call.timeout_s,
        )
        return wire.match_result_out(result)

    async def _announce(self, asked: control.AnnounceRequest, call: Call) -> control.AnnounceResponse:
        snapshot = wire.snapshot_in(asked)
        self._owners.check(call.caller, snapshot.namespace)
        keys, wait_s = wire.split_keys(asked.keys), asked.wait_ms / 1000
        announced = await self._shard.announce(snapshot, keys, wait_s, timeout_s=call.timeout_s)
        return wire.announced_out(announced)

    async def _renew(self, asked: control.RenewRequest, call: Call) -> control.RenewResponse:
        wire.at_most(LEASES_MAX, len(asked.leases), "leases")
        leases = [LeaseId(lease) for lease in asked.leases]
        held = await self._shard.renew(leases, asked.lease_ms / 1000, timeout_s=call.timeout_s)
        return control.RenewResponse(held=held)

    async def _release(self, asked: control.ReleaseRequest, call: Call) -> control.ReleaseResponse:
        wire.at_most(LEASES_MAX, len(asked.leases), "leases")
        await self._shard.release([LeaseId(lease) for lease in asked.leases], timeout_s=call.timeout_s)
        return control.ReleaseResponse()

    async def _begin(self, asked: control.BeginRequest, call: Call) -> control.BeginResponse:
        opened = await self._shard.begin(
            self.namespace(asked.namespace_id, call.caller),
            wire.epoch_in(asked.epoch),
            wire.quality_in(asked.quality),
            wire.offers_in(asked),
            wire.owner_in(asked.owner),
            asked.lease_ms / 1000,
            wire.fixed(asked.request_id, REQUEST_ID_NBYTES, "request_id"),
            timeout_s=call.timeout_s,
        )
        return control.BeginResponse(txn=opened.txn, refusals=wire.refusals_out(opened.outcomes))

    async def _commit(self, asked: control.CommitRequest, call: Call) -> control.CommitResponse:
        pin_for_s = asked.pin_for_ms / 1000 or None
        done = await self._shard.commit(TxnId(asked.txn), pin_for_s, timeout_s=call.timeout_s)
        return wire.commit_out(done)

    async def _abort(self, asked: control.AbortRequest, call: Call) -> control.AbortResponse:
        await self._shard.abort(TxnId(asked.txn), timeout_s=call.timeout_s)
        return control.AbortResponse()

    async def _report(self, asked: control.ReportRequest, call: Call) -> control.ReportResponse:
        namespace = self.namespace(asked.namespace_id, call.caller)
        retired = await self._shard.report(
            namespace, refs_in(self._shard.shard, asked), timeout_s=call.timeout_s
        )
        return control.ReportResponse(retired=retired)

    async def _list(self, asked: control.ListRequest, call: Call) -> control.ListResponse:
        page = await self._shard.listing(
            self.namespace(asked.namespace_id, call.caller),
            wire_history.after_in(asked),
            asked.cursor,
            wire_history.limit_in(asked.limit),
            timeout_s=call.timeout_s,
        )
        return wire_history.page_out(page)

    async def _purge(self, asked: control.PurgeRequest, call: Call) -> control.PurgeResponse:
        scope = wire_history.scope_in(asked)
        purged = await self._shard.purge(scope, timeout_s=call.timeout_s)
        log.info("purged", namespace=scope.namespace.hex(), epoch=scope.epoch, versions=purged.versions)
        return wire_history.purged_out(purged)

    async def _compact(self, asked: control.CompactRequest, call: Call) -> control.CompactResponse:
        horizon = await self._shard.compact(wire.revision_in(asked.revision), timeout_s=call.timeout_s)
        return control.CompactResponse(horizon=wire.revision_out(horizon))

    async def _show_namespaces(
        self, asked: control.ShowNamespacesRequest, call: Call
    ) -> control.ShowNamespacesResponse:
        if not call.caller.trusted:
            raise PermissionDenied("namespaces of all tenants: show the cluster's token")
        return wire_history.known_out(await self._shard.namespaces(timeout_s=call.timeout_s))

    async def _status(self, asked: control.StatusRequest, call: Call) -> control.StatusResponse:
        if not call.caller.trusted:
            raise PermissionDenied("the status speaks of all tenants: show the cluster's token")
        return wire.status_out(await self._shard.status(timeout_s=call.timeout_s))

    async def _get_topology(self, asked: Any, call: Call) -> topology.GetTopologyResponse:
        return topology.GetTopologyResponse(topology=wire.topology_out(self.topology))
