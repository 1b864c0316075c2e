"""One shard over gRPC, as a `ShardTransport`. Control and bulk travel on two connections.

Unary calls but the hello go over one Pipeline stream. A shard that pushes back is asked again after the time
it names, if the caller's deadline has room for that. Every call has a deadline; every failure comes out as
one of `errors.py`'s. Frames arrive in messages of about 2 MiB and are put together in a buffer the reader
owns; a stream that breaks raises, and what was yielded before stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from kvstore import failpoints, trace
from kvstore.closing import closing
from kvstore.deadline import Deadline
from kvstore.errors import ConfigError, DeadlineExceeded, OverLimit, Unavailable, WireVersionMismatch
from kvstore.nouns import (
    ISOLATE,
    BlockKey,
    BlockRef,
    Epoch,
    EpochPolicy,
    EpochsOfModel,
    Incarnation,
    KnownNamespace,
    LeaseId,
    NamespaceId,
    NamespaceSpec,
    Quality,
    Refusal,
    Revision,
    ShardId,
    Snapshot,
    TxnId,
)
from kvstore.topology import Topology
from kvstore.transport.base import (
    WIRE_VERSIONS_READ,
    Announced,
    BlockOffer,
    CommitResult,
    ListPage,
    MatchResult,
    Purge,
    Purged,
    ReadItem,
    ShardHello,
    ShardStatus,
    TxnOpened,
    WatchBatch,
)
from kvstore.transport.grpc import faults, methods, wire, wire_history
from kvstore.transport.grpc.blocks_client import BlocksClient, runs_of_one_incarnation
from kvstore.transport.grpc.methods import Answer, Asked, Method
from kvstore.transport.grpc.options import channel_options
from kvstore.transport.grpc.pipeline_client import Late, Pipeline
from kvstore.transport.grpc.watch_client import watch_until
from kvstore.transport.landing import Landing, LandingTransport
from kvstore.v1 import control_pb2 as control
from kvstore.v1 import topology_pb2 as topology

ANY_SHARD: Final = ShardId("")
"""Whoever answers at the address: who it is, the hello tells."""
ATTEMPTS_MAX: Final = 3  # of one call: the first, and what a shard's push-back asks for
GIVE_BACK_S: Final = 5.0


class GrpcTransport(LandingTransport):
    """Lazy: nothing is sent before the first call. Belongs to one event loop."""

    def __init__(
        self,
        shard: ShardId,
        address: str,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._shard = shard
        self.address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._greeted = self._closed = False
        self._greeting = asyncio.Lock()
        self._control = _channel(address, "control", credentials)
        self._bulk = _channel(address, "bulk", credentials)
        self._blocks = BlocksClient(self._bulk, self._traced)
        self._pipeline = Pipeline(self._control, self._metadata, shard)

    @property
    def shard(self) -> ShardId:
        return self._shard

    async def hello(self, *, timeout_s: float) -> ShardHello:
        asked = control.HelloRequest(wire_versions=sorted(WIRE_VERSIONS_READ, reverse=True), client="python")
        answer = await self._unary(methods.HELLO, asked, timeout_s)
        if answer.wire_version not in WIRE_VERSIONS_READ:
            raise WireVersionMismatch(f"shard {self.shard} speaks wire version {answer.wire_version}")
        if self._shard == ANY_SHARD:
            self._shard = ShardId(answer.shard)
        if answer.shard != self.shard:
            raise Unavailable(
                f"{self.address} is shard {answer.shard}, not {self.shard}: refresh the topology"
            )
        self._greeted = True
        return ShardHello(
            self.shard,
            Incarnation(answer.incarnation),
            answer.wire_version,
            answer.disk_version,
            answer.shm_socket,
        )

    async def open_namespace(self, spec: NamespaceSpec, tenant: str, *, timeout_s: float) -> NamespaceId:
        answer = await self._call(methods.OPEN_NAMESPACE, wire.spec_out(spec, tenant), timeout_s)
        with self._understood():
            return wire.namespace_in(answer.namespace_id)

    async def register_epoch(self, model_id: str, epoch: Epoch, *, timeout_s: float) -> None:
        asked = control.RegisterEpochRequest(model_id=model_id, epoch=wire.epoch_out(epoch))
        await self._call(methods.REGISTER_EPOCH, asked, timeout_s)

    async def advance_epoch(
        self, model_id: str, number: int, policy: EpochPolicy = ISOLATE, *, timeout_s: float
    ) -> Revision:
        """On the admin's address only: elsewhere PermissionDenied. So are `purge` and `compact`."""
        asked = wire_history.advance_out(model_id, number, policy)
        answer = await self._call(methods.ADVANCE_EPOCH, asked, timeout_s)
        return wire.revision_in(answer.revision)

    async def epochs(self, model_id: str, *, timeout_s: float) -> EpochsOfModel:
        answer = await self._call(
            methods.SHOW_EPOCHS, control.ShowEpochsRequest(model_id=model_id), timeout_s
        )
        with self._understood():
            return wire_history.epochs_in(answer)

    async def namespaces(self, *, timeout_s: float) -> tuple[KnownNamespace, ...]:
        answer = await self._call(methods.SHOW_NAMESPACES, control.ShowNamespacesRequest(), timeout_s)
        with self._understood():
            return wire_history.known_in(answer)

    async def match(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], owner: str, lease_s: float, *, timeout_s: float
    ) -> MatchResult:
        await failpoints.hit("transport.match")
        asked = wire.match_out(snapshot, keys, owner, lease_s)
        answer = await self._call(methods.MATCH, asked, timeout_s, self._give_back)
        with self._understood():
            return wire.match_result_in(answer, len(keys))

    async def announce(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], wait_s: float, *, timeout_s: float
    ) -> Announced:
        asked = wire.announce_out(snapshot, keys, wait_s)
        answer = await self._call(methods.ANNOUNCE, asked, timeout_s)
        with self._understood():
            return wire.announced_in(answer, len(keys))

    async def read(
        self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> AsyncIterator[ReadItem]:
        deadline = await self._introduced(timeout_s)
        for run_start, run in runs_of_one_incarnation(refs):
            with self._named_errors():
                async with closing(self._blocks.read(namespace, run, deadline.left())) as items:
                    async for item in items:
                        await failpoints.hit("transport.read")
                        yield ReadItem(run_start + item.index, item.frame, item.miss)

    async def read_into(
        self,
        namespace: NamespaceId,
        refs: Sequence[BlockRef],
        landing: Landing,
        rows: Sequence[int],
        *,
        timeout_s: float,
    ) -> None:
        await failpoints.hit("transport.read")
        deadline = await self._introduced(timeout_s)
        for start, run in runs_of_one_incarnation(refs):
            into = rows[start : start + len(run)]
            with self._named_errors():
                await self._blocks.read_into(namespace, run, landing, into, deadline.left())

    async def renew(self, leases: Sequence[LeaseId], lease_s: float, *, timeout_s: float) -> list[bool]:
        asked = control.RenewRequest(leases=leases, lease_ms=wire.lease_ms(lease_s))
        return list((await self._call(methods.RENEW, asked, timeout_s)).held)

    async def release(self, leases: Sequence[LeaseId], *, timeout_s: float) -> None:
        await failpoints.hit("transport.release")
        await self._call(methods.RELEASE, control.ReleaseRequest(leases=leases), timeout_s)

    async def begin(
        self,
        namespace: NamespaceId,
        epoch: Epoch,
        quality: Quality,
        offers: Sequence[BlockOffer],
        owner: str,
        lease_s: float,
        request_id: bytes,
        *,
        timeout_s: float,
    ) -> TxnOpened:
        await failpoints.hit("transport.begin")
        asked = wire.begin_out(namespace, epoch, quality, offers, owner, lease_s, request_id)
        answer = await self._call(methods.BEGIN, asked, timeout_s, self._undo)
        with self._understood():
            return TxnOpened(TxnId(answer.txn), wire.refusals_in(answer.refusals))

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], *, timeout_s: float
    ) -> list[Refusal | None]:
        await failpoints.hit("transport.write")
        deadline = await self._introduced(timeout_s)
        with self._named_errors():
            return await self._blocks.write(txn, frames, deadline.left())

    async def commit(self, txn: TxnId, pin_for_s: float | None, *, timeout_s: float) -> CommitResult:
        await failpoints.hit("transport.commit")
        asked = control.CommitRequest(txn=txn, pin_for_ms=wire.lease_ms(pin_for_s or 0))
        answer = await self._call(methods.COMMIT, asked, timeout_s)
        with self._understood():
            return wire.commit_in(self.shard, answer)

    async def abort(self, txn: TxnId, *, timeout_s: float) -> None:
        await self._call(methods.ABORT, control.AbortRequest(txn=txn), timeout_s)

    async def report(self, namespace: NamespaceId, refs: Sequence[BlockRef], *, timeout_s: float) -> int:
        retired = 0
        for _, run in runs_of_one_incarnation(refs):
            asked = control.ReportRequest(
                incarnation=run[0].incarnation,
                slots=[ref.slot for ref in run],
                generations=[ref.generation for ref in run],
                namespace_id=namespace,
            )
            retired += (await self._call(methods.REPORT, asked, timeout_s)).retired
        return retired

    async def listing(
        self, namespace: NamespaceId, at: Revision | None, cursor: int, limit: int, *, timeout_s: float
    ) -> ListPage:
        asked = control.ListRequest(
            namespace_id=namespace,
            revision=None if at is None else wire.revision_out(at),
            cursor=cursor,
            limit=limit,
        )
        answer = await self._call(methods.LIST, asked, timeout_s)
        with self._understood():
            return wire_history.page_in(answer)

    async def watch(
        self, namespaces: Sequence[NamespaceId], after: Revision | None, *, timeout_s: float
    ) -> AsyncIterator[WatchBatch]:
        deadline = await self._introduced(timeout_s)
        open_watch: Any = self._control.unary_stream(methods.WATCH.path, **methods.WATCH.codec())
        batches = watch_until(
            deadline,
            lambda asked, left_s: open_watch(asked, timeout=left_s, metadata=self._traced()),
            namespaces,
            after,
            self._named_errors,
            self._understood,
        )
        async with contextlib.aclosing(batches):
            async for batch in batches:
                yield batch

    async def purge(self, scope: Purge, *, timeout_s: float) -> Purged:
        answer = await self._call(methods.PURGE, wire_history.scope_out(scope), timeout_s)
        return wire_history.purged_in(answer)

    async def compact(self, revision: Revision, *, timeout_s: float) -> Revision:
        asked = control.CompactRequest(revision=wire.revision_out(revision))
        return wire.revision_in((await self._call(methods.COMPACT, asked, timeout_s)).horizon)

    async def status(self, *, timeout_s: float) -> ShardStatus:
        return wire.status_in(await self._call(methods.STATUS, control.StatusRequest(), timeout_s))

    async def topology(self, *, timeout_s: float) -> Topology:
        answer = await self._call(methods.GET_TOPOLOGY, topology.GetTopologyRequest(), timeout_s)
        with self._understood():
            return wire.topology_in(answer.topology)

    async def close(self) -> None:
        """What is under way ends in Unavailable, and so does what comes after."""
        self._closed = True
        await self._pipeline.close()
        await asyncio.gather(self._control.close(), self._bulk.close())

    async def _introduced(self, timeout_s: float) -> Deadline:
        """Who is behind the address is asked before anything else, and again when it was gone."""
        deadline = Deadline(timeout_s)
        if self._greeted:
            return deadline
        try:
            async with asyncio.timeout_at(deadline.at):
                await self._greeting.acquire()  # one asks for all who come meanwhile
        except TimeoutError:
            raise DeadlineExceeded(f"shard {self.shard} did not say in time who it is") from None
        try:
            if not self._greeted:
                await self.hello(timeout_s=deadline.left())
        finally:
            self._greeting.release()
        return deadline

    async def _call(
        self, method: Method[Asked, Answer], asked: Asked, timeout_s: float, late: Late | None = None
    ) -> Answer:
        deadline = await self._introduced(timeout_s)
        if method not in methods.PIPELINED:
            return await self._unary(method, asked, deadline.left())
        request = asked.SerializeToString()
        for attempt in range(1, ATTEMPTS_MAX + 1):
            with self._named_errors():
                try:
                    answer = await self._pipeline.call(method.name, request, deadline.left(), late)
                    return method.answer.FromString(answer)
                except OverLimit as error:
                    wait_s = (error.retry_after_s or 0) * random.uniform(1, 2)  # noqa: S311 - spread, no secret
                    if not wait_s or attempt == ATTEMPTS_MAX or wait_s >= deadline.left():
                        raise
            await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt answers or raises")

    async def _unary(self, method: Method[Asked, Answer], asked: Asked, timeout_s: float) -> Answer:
        with self._named_errors():
            call = self._control.unary_unary(method.path, **method.codec())
            answer: Answer = await call(asked, timeout=timeout_s, metadata=self._traced())
            return answer

    def _traced(self) -> tuple[tuple[str, str], ...]:
        traceparent = trace.current()
        return (*self._metadata, (trace.TRACE_METADATA, traceparent)) if traceparent else self._metadata

    def _give_back(self, answer: bytes) -> None:
        """A match that was answered when nobody waited any more: what it pinned is nobody's."""
        with contextlib.suppress(DecodeError):
            lease = control.MatchResponse.FromString(answer).lease
            if lease:
                asked = control.ReleaseRequest(leases=[lease])
                self._pipeline.tell(methods.RELEASE.name, asked.SerializeToString(), GIVE_BACK_S)

    def _undo(self, answer: bytes) -> None:
        """A transaction that was opened when nobody waited any more: nobody else could ever abort it."""
        with contextlib.suppress(DecodeError):
            asked = control.AbortRequest(txn=control.BeginResponse.FromString(answer).txn)
            self._pipeline.tell(methods.ABORT.name, asked.SerializeToString(), GIVE_BACK_S)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """An answer that says what we have no word for is a shard that cannot serve us."""
        try:
            yield
        except (ValueError, ConfigError) as error:
            raise Unavailable(f"shard {self.shard} answers what we do not understand: {error}") from error

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Whatever fails on the way comes out as one of `errors.py`'s."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            named = faults.error_in(error, self.shard)
            self._greeted = self._greeted and not isinstance(named, Unavailable)
            raise named from None
        except Unavailable:
            self._greeted = False
            raise
        except (asyncio.CancelledError, grpc.aio.UsageError):
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise  # it is the caller who is cancelled, or we who are wrong
            raise Unavailable(f"the connection to shard {self.shard} was closed") from None
        except (ValueError, DecodeError) as error:
            raise Unavailable(f"shard {self.shard} answers what we do not understand: {error}") from error


def _channel(address: str, traffic: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    options = channel_options(traffic)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)
