"""Epochs, listings, watches, purges over the wire: what the driver says is what a client hears."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest

from kvstore.errors import Compacted, ConfigError, NotFound, OverLimit, PermissionDenied, Unavailable
from kvstore.nouns import (
    DROP,
    ROOT_KEY,
    Change,
    ChangeKind,
    EpochsOfModel,
    Incarnation,
    Listed,
    NamespaceId,
    Revision,
    Snapshot,
    allow_stale,
)
from kvstore.transport.base import Purge, WatchBatch
from kvstore.transport.grpc import methods, watch_service, wire, wire_history
from kvstore.transport.grpc.client import GrpcTransport
from kvstore.transport.grpc.methods import Method
from kvstore.v1 import control_pb2 as control
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain, epoch, put

E1, E2 = epoch(1), epoch(2)


@pytest.fixture
async def admin(served: Served) -> AsyncIterator[GrpcTransport]:
    made = GrpcTransport(served.driver.shard, served.server.admin_address, TOKEN)
    yield made
    await made.close()


async def opened(transport: GrpcTransport) -> NamespaceId:
    for number in (E1, E2):
        await transport.register_epoch(SPEC.model_id, number, timeout_s=TIMEOUT)
    return await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)


@pytest.mark.parametrize("policy", [allow_stale(1), DROP])
async def test_a_models_epochs(transport: GrpcTransport, admin: GrpcTransport, policy: Any) -> None:
    unknown = await transport.epochs("unheard of", timeout_s=TIMEOUT)
    assert unknown == EpochsOfModel((), 0, 0, 0)
    await opened(transport)
    before = await transport.epochs(SPEC.model_id, timeout_s=TIMEOUT)
    assert (before.registered, before.current) == ((E1, E2), 1)
    revision = await admin.advance_epoch(SPEC.model_id, 2, policy, timeout_s=TIMEOUT)
    after = await transport.epochs(SPEC.model_id, timeout_s=TIMEOUT)
    assert (after.current, after.stale_lag_max) == (2, policy.stale_lag_max)
    assert after.oldest == (2 if policy is DROP else 0)
    assert revision.incarnation == (await transport.hello(timeout_s=TIMEOUT)).incarnation


async def test_a_listing_is_the_drivers_own_page_by_page(served: Served, transport: GrpcTransport) -> None:
    namespace = await opened(transport)
    made = chain(namespace, 5)
    await put(served.driver, made, range(5), E1)
    at, cursor = None, 0
    heard: list[Listed] = []
    for _ in range(3):
        page = await transport.listing(namespace, at, cursor, 2, timeout_s=TIMEOUT)
        own = await served.driver.listing(namespace, at, cursor, 2, timeout_s=TIMEOUT)
        assert page == own
        at, cursor = page.revision, page.next_cursor
        heard += page.versions
    assert cursor == 0
    assert {version.key for version in heard} == set(made.keys)
    with pytest.raises(ConfigError, match="give a limit"):
        await transport.listing(namespace, at, 0, 0, timeout_s=TIMEOUT)
    with pytest.raises(Compacted):
        await transport.listing(namespace, Revision(Incarnation(1), 1), 0, 1, timeout_s=TIMEOUT)


async def test_a_purge_deletes_and_compaction_forgets(
    served: Served, transport: GrpcTransport, admin: GrpcTransport
) -> None:
    namespace = await opened(transport)
    made = chain(namespace, 3)
    done = await put(served.driver, made, range(3), E1)
    purged = await admin.purge(Purge(namespace, keys=(made.keys[2],)), timeout_s=TIMEOUT)
    assert (purged.versions, purged.revision > done.revision) == (1, True)
    assert (await admin.purge(Purge(namespace, epoch=1), timeout_s=TIMEOUT)).versions == 2
    assert (await admin.purge(Purge(namespace), timeout_s=TIMEOUT)).versions == 0
    found = await transport.match(Snapshot(namespace, E1), made.keys, "r", 1.0, timeout_s=TIMEOUT)
    assert len(found) == 0
    horizon = await admin.compact(purged.revision, timeout_s=TIMEOUT)
    assert horizon.counter >= purged.revision.counter
    with pytest.raises(Compacted):
        await anext(transport.watch([namespace], done.revision, timeout_s=TIMEOUT))


def test_a_purge_that_could_be_misread_is_refused() -> None:
    """No keys on the wire mean all of the namespace: the empty tuple must never become that."""
    namespace = NamespaceId(bytes(16))
    for scope in (Purge(namespace, keys=()), Purge(namespace, keys=(ROOT_KEY,), epoch=1)):
        with pytest.raises(ConfigError, match="purge of"):
            wire_history.scope_out(scope)
    both = control.PurgeRequest(namespace_id=namespace, keys=bytes(32), epoch_number=0)
    with pytest.raises(ConfigError, match="not of both"):
        wire_history.scope_in(both)
    assert wire_history.scope_in(control.PurgeRequest(namespace_id=namespace, epoch_number=0)).epoch == 0


async def test_admins_calls_are_made_on_the_admins_port(
    transport: GrpcTransport, admin: GrpcTransport
) -> None:
    namespace = await opened(transport)
    calls: dict[Method[Any, Any], Callable[[], Awaitable[Any]]] = {
        methods.ADVANCE_EPOCH: lambda: transport.advance_epoch(SPEC.model_id, 2, timeout_s=TIMEOUT),
        methods.PURGE: lambda: transport.purge(Purge(namespace), timeout_s=TIMEOUT),
        methods.COMPACT: lambda: transport.compact(Revision(Incarnation(1), 1), timeout_s=TIMEOUT),
    }
    assert calls.keys() == methods.ADMIN
    for method, call in calls.items():
        with pytest.raises(PermissionDenied, match="admin port"):
            await call()
        unary: Any = transport._control.unary_unary(method.path, **method.codec())
        with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
            await unary(method.asked(), metadata=transport._metadata, timeout=TIMEOUT)
    assert (await admin.status(timeout_s=TIMEOUT)).shard == "shard-0"


async def test_a_watch_tells_every_change_in_order(served: Served, transport: GrpcTransport) -> None:
    namespace = await opened(transport)
    made = chain(namespace, 2)
    watching = transport.watch([namespace], None, timeout_s=TIMEOUT)
    first = await anext(watching)
    assert first.changes == ()
    done = await put(served.driver, made, [0, 1], E1)
    batch = await anext(watching)
    assert [(c.revision, c.kind, c.namespace, c.key, c.epoch) for c in batch.changes] == [
        (done.revision.counter, ChangeKind.COMMITTED, namespace, key, 1) for key in made.keys
    ]
    again = await anext(transport.watch([namespace], first.revision, timeout_s=TIMEOUT))
    assert again.changes == batch.changes
    with pytest.raises(NotFound):
        await anext(transport.watch([NamespaceId(b"?" * 16)], None, timeout_s=TIMEOUT))
    with pytest.raises(ConfigError, match="watch of 0 namespaces"):
        await anext(transport.watch([], None, timeout_s=TIMEOUT))


async def test_a_watch_longer_than_the_shards_turn_misses_nothing(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_service, "WATCH_S_MAX", 0.2)
    namespace = await opened(transport)
    made = chain(namespace, 3)
    asked: list[Revision | None] = []
    own = served.driver.watch

    def listen(namespaces: Any, after: Revision | None, *, timeout_s: float) -> AsyncIterator[WatchBatch]:
        asked.append(after)
        return own(namespaces, after, timeout_s=timeout_s)

    monkeypatch.setattr(served.driver, "watch", listen)
    heard: list[Change] = []
    last: Revision | None = None
    written = 0
    async for batch in transport.watch([namespace], None, timeout_s=TIMEOUT):
        assert last is None or batch.revision >= last
        last = batch.revision
        heard += batch.changes
        if written < 3 and len(asked) > written:  # one commit in every turn of the shard's
            await put(served.driver, made, [written], E1)
            written += 1
        if len(heard) == 3:
            break
    assert [change.key for change in heard] == made.keys
    assert asked[0] is None
    assert None not in asked[1:]


async def test_a_watch_ends_with_its_deadline_and_says_nothing_wrong(
    transport: GrpcTransport,
) -> None:
    namespace = await opened(transport)
    batches = [b async for b in transport.watch([namespace], None, timeout_s=0.3)]
    assert [b.changes for b in batches] == [()] * len(batches)
    assert batches


async def test_a_draining_shard_ends_its_watches(served: Served, transport: GrpcTransport) -> None:
    namespace = await opened(transport)
    watching = transport.watch([namespace], None, timeout_s=60.0)
    await anext(watching)
    stopping = asyncio.ensure_future(served.server.stop(TIMEOUT))
    with contextlib.suppress(Unavailable):  # the watcher goes on where somebody answers
        async with asyncio.timeout(TIMEOUT):
            async for batch in watching:
                assert batch.changes == ()
    await asyncio.wait_for(stopping, TIMEOUT)


async def test_only_so_many_watches_and_none_held_by_who_left(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.server._service.watches, "_watches_max", 1)
    namespace = await opened(transport)
    watching = transport.watch([namespace], None, timeout_s=TIMEOUT)
    await anext(watching)
    with pytest.raises(OverLimit, match="1 watches are open") as refused:
        await anext(transport.watch([namespace], None, timeout_s=TIMEOUT))
    assert refused.value.retry_after_s == watch_service.RETRY_AFTER_S
    await watching.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(TIMEOUT):
        while len(served.server._service.watches):  # noqa: ASYNC110 - the shard tells nobody
            await asyncio.sleep(0)
    assert (await anext(transport.watch([namespace], None, timeout_s=TIMEOUT))).changes == ()


async def test_a_watcher_that_does_not_read_is_not_written_to(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has not been sent is in the shard's log, not in a queue of its own."""
    pulled, released = 0, asyncio.Event()
    changes = tuple(
        Change(1, ChangeKind.COMMITTED, NamespaceId(bytes(16)), ROOT_KEY, 1, 1000) for _ in range(60_000)
    )

    async def endless(*_: object, timeout_s: float) -> AsyncIterator[WatchBatch]:
        nonlocal pulled
        try:
            while True:
                pulled += 1
                yield WatchBatch(Revision(Incarnation(7), 1), changes)
        finally:
            released.set()

    namespace = await opened(transport)
    monkeypatch.setattr(served.driver, "watch", endless)
    unary: Any = transport._control.unary_stream(methods.WATCH.path, **methods.WATCH.codec())
    asked = control.WatchRequest(namespace_ids=[namespace])
    unread = unary(asked, metadata=transport._metadata, timeout=TIMEOUT)
    await unread.read()
    before = 0
    while pulled != before:  # until it is pulled no further
        before = pulled
        await asyncio.sleep(0.2)
    assert before < 20, "a few windows of 16 MiB, at some 4 MB a batch"
    unread.cancel()
    await asyncio.wait_for(released.wait(), TIMEOUT)


def test_a_revision_is_never_torn_over_messages() -> None:
    changes = [
        Change(revision, ChangeKind.COMMITTED, NamespaceId(bytes(16)), ROOT_KEY, 1, 1000)
        for revision, count in ((1, 3_000), (2, 3_000), (3, 9_000), (4, 1))
        for _ in range(count)
    ]
    batch = WatchBatch(Revision(Incarnation(7), 9), tuple(changes))
    sent = list(wire_history.batches_out(batch))
    heard = [wire_history.batch_in(message) for message in sent]
    assert [{c.revision for c in b.changes} for b in heard] == [{1, 2}, {3}, {4}]
    assert [b.revision.counter for b in heard] == [2, 3, 9], "nothing at or before it is still to come"
    assert [c for b in heard for c in b.changes] == changes


@pytest.mark.parametrize(
    "broken",
    [
        {"revisions": [2, 1]},
        {"revisions": [1, 10]},
        {"revisions": [1]},
        {"kinds": [1, 9]},
        {"keys": bytes(33)},
        {"namespace_ids": bytes(16)},
    ],
    ids=str,
)
async def test_a_watch_that_makes_no_sense_is_a_shard_that_cannot_serve(
    served: Served, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any]
) -> None:
    def nonsense(_: WatchBatch) -> Sequence[control.WatchResponse]:
        columns: dict[str, Any] = {
            "revision": wire.revision_out(Revision(Incarnation(7), 9)),
            "revisions": [1, 2],
            "kinds": [1, 1],
            "namespace_ids": bytes(32),
            "keys": bytes(64),
            "epoch_numbers": [1, 1],
            "qualities": [1000, 1000],
        }
        return [control.WatchResponse(**columns | broken)]

    namespace = await opened(transport)
    monkeypatch.setattr(wire_history, "batches_out", nonsense)
    with pytest.raises(Unavailable, match="do not understand"):
        await anext(transport.watch([namespace], None, timeout_s=TIMEOUT))
