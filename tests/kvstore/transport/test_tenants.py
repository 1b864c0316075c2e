"""Promise 1, threat model: a tenant sees its own namespaces and nobody else's, by token or certificate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.access import Tenant
from kvstore.answers import VerifiedBlock
from kvstore.client import StoreClient
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.errors import (
    ConfigError,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from kvstore.nouns import BlockKey, BlockRef, Incarnation, MissReason, NamespaceId, Quality, ShardId, Snapshot
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.arena import ArenaTier
from kvstore.tls import ClientTls, TlsFiles, peer_names
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.grpc import methods
from kvstore.transport.grpc.client import GrpcTransport
from tests.kvstore.oracle import SECRET, SPEC, TIMEOUT, chain, epoch, new_driver, offer, put

E1 = epoch(1)
SHARD = ShardId("shard-0")
CLUSTER = "cluster's token"
TENANTS = (
    Tenant("alice", "alice's token", "alice.example"),
    Tenant("bob", "bob's token", "bob.example", may_bind_epochs=True),
)


class World:
    """One shard and those who call it."""

    def __init__(self, driver: ShardDriver, server: ShardServer, address: str) -> None:
        self.driver, self.server, self.address = driver, server, address
        self._made: list[GrpcTransport] = []

    def caller(
        self, token: str | None, tls: ClientTls | None = None, *, admin: bool = False
    ) -> GrpcTransport:
        address = self.server.admin_address if admin else self.address
        made = GrpcTransport(SHARD, address, token, tls.channel_credentials() if tls else None)
        self._made.append(made)
        return made

    async def close(self) -> None:
        for transport in self._made:
            await transport.close()
        await self.server.stop(0)
        self.driver.check_integrity()


async def start(driver: ShardDriver | None = None, **changes: Any) -> World:
    driver = driver or new_driver()
    tenants = TENANTS if "tls" in changes else tuple(replace(t, certificate=None) for t in TENANTS)
    server = ShardServer(driver, ServerConfig(token="cluster's token", tenants=tenants, **changes))
    return World(driver, server, await server.start())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = await start()
    yield made
    await made.close()


async def own(transport: GrpcTransport, tenant: str = "") -> NamespaceId:
    return await transport.open_namespace(SPEC, tenant, timeout_s=TIMEOUT)


def calls_naming(
    transport: GrpcTransport, namespace: NamespaceId, key: BlockKey
) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every call that names a namespace, but for opening one and the admin's."""
    made = chain(namespace, 1)
    ref = BlockRef(SHARD, Incarnation(7), 0, 1)
    begin = (namespace, E1, Quality.LOSSLESS, [offer(made, 0)], "w", 5.0, bytes(namespace))
    return {
        "Match": lambda: transport.match(Snapshot(namespace, E1), [key], "r", 1.0, timeout_s=TIMEOUT),
        "Announce": lambda: transport.announce(Snapshot(namespace, E1), [key], 0.0, timeout_s=TIMEOUT),
        "Begin": lambda: transport.begin(*begin, timeout_s=TIMEOUT),
        "List": lambda: transport.listing(namespace, None, 0, 9, timeout_s=TIMEOUT),
        "Watch": lambda: anext(transport.watch([namespace], None, timeout_s=TIMEOUT)),
        "Read": lambda: anext(transport.read(namespace, [ref], timeout_s=TIMEOUT)),
        "Report": lambda: transport.report(namespace, [ref], timeout_s=TIMEOUT),
    }


def test_the_calls_tested_are_all_that_name_a_namespace() -> None:
    every = [*methods.UNARY, methods.WATCH, methods.READ]
    named = {
        m.name for m in every if {"namespace_id", "namespace_ids"} & set(m.asked.DESCRIPTOR.fields_by_name)
    }
    admins = {m.name for m in methods.ADMIN}
    nobody: Any = None
    assert named - admins == set(calls_naming(nobody, NamespaceId(bytes(16)), BlockKey(bytes(32))))


@pytest.mark.parametrize("call", ["Match", "Announce", "Begin", "List", "Watch", "Read", "Report"])
async def test_a_tenant_cannot_name_anothers_namespace_even_if_it_learned_its_id(
    world: World, call: str
) -> None:
    alice, bob = world.caller("alice's token"), world.caller("bob's token")
    await bob.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    theirs, mine = await own(bob), await own(alice)
    assert theirs != mine
    made = chain(theirs, 1)
    await put(world.driver, made, [0], E1)
    with pytest.raises(PermissionDenied, match="not tenant alice's"):
        await calls_naming(alice, theirs, made.keys[0])[call]()
    with pytest.raises(NotFound, match="open it first"):
        await calls_naming(alice, NamespaceId(b"?" * 16), made.keys[0])[call]()
    await calls_naming(bob, theirs, made.keys[0])[call]()
    await calls_naming(alice, mine, made.keys[0])[call]()


async def test_a_key_learned_from_another_tenant_matches_nothing(world: World) -> None:
    alice, bob = world.caller("alice's token"), world.caller("bob's token")
    await bob.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    made = chain(await own(bob), 1)
    await put(world.driver, made, [0], E1)
    snapshot = Snapshot(await own(alice), E1)
    found = await alice.match(snapshot, made.keys, "r", 1.0, timeout_s=TIMEOUT)
    assert (len(found), found.miss) == (0, MissReason.ABSENT)


async def test_a_tenant_is_who_its_token_says(world: World) -> None:
    alice, cluster = world.caller("alice's token"), world.caller("cluster's token")
    mine = await own(alice)
    assert {await own(alice, name) for name in ("", "alice", "default")} == {mine}
    with pytest.raises(PermissionDenied, match="cannot act for another"):
        await own(alice, "bob")
    assert await own(cluster, "alice") == mine
    assert len({await own(cluster, name) for name in ("alice", "bob", "default")}) == 3
    assert await own(cluster) == await own(cluster, "default")


@pytest.mark.parametrize(("token", "attached"), [("cluster's token", 1), ("alice's token", 0)])
async def test_a_tenant_reads_its_blocks_but_never_maps_the_arena_of_all(token: str, attached: int) -> None:
    capacity_nbytes = 1 << 20
    config = DriverConfig(SHARD, capacity_nbytes, SECRET)
    world = await start(ShardDriver(config, ArenaTier(capacity_nbytes)))
    await world.driver.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    topology = Topology(1, (ShardEntry(SHARD, world.address),))
    async with await StoreClient.connect(topology, token=token) as client:
        session = await client.open(SPEC, E1, tenant="alice")
        made = chain(session.namespace, 1)
        await put(world.driver, made, [0], E1)
        found = await session.match(made.keys, owner="r", lease_s=5.0, timeout_s=TIMEOUT)
        read = [item async for item in session.read(found.blocks, timeout_s=TIMEOUT)]
        assert [type(item) for item in read] == [VerifiedBlock]
        await session.release(found.leases)
        assert client.counters["shm:attached"] == attached
    await world.close()


async def test_what_a_tenant_may_not_do(world: World) -> None:
    alice, bob = world.caller("alice's token"), world.caller("bob's token")
    with pytest.raises(PermissionDenied, match="speaks of all tenants"):
        await alice.status(timeout_s=TIMEOUT)
    with pytest.raises(PermissionDenied, match="admin port"):
        await alice.advance_epoch(SPEC.model_id, 1, timeout_s=TIMEOUT)
    with pytest.raises(PermissionDenied, match="ask the operator"):
        await alice.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
    await bob.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)  # which its tenant may
    await alice.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)  # bound by somebody who may
    with pytest.raises(PermissionDenied, match="no namespace of"):
        await alice.epochs(SPEC.model_id, timeout_s=TIMEOUT)  # what others run is theirs to know
    await alice.open_namespace(SPEC, "", timeout_s=TIMEOUT)
    assert (await alice.epochs(SPEC.model_id, timeout_s=TIMEOUT)).registered == (E1,)


@pytest.mark.parametrize(
    ("token", "error"),
    [("alice's token", PermissionDenied), ("wrong", Unauthenticated), (None, Unauthenticated)],
)
async def test_the_admins_port_takes_the_clusters_token_alone(
    world: World, token: str | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await world.caller(token, admin=True).hello(timeout_s=TIMEOUT)
    admin = world.caller("cluster's token", admin=True)
    assert (await admin.status(timeout_s=TIMEOUT)).shard == SHARD
    reading: Any = admin._bulk.unary_stream(methods.READ.path, methods.READ.asked.SerializeToString)
    with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
        await reading(methods.READ.asked(), metadata=admin._metadata, timeout=TIMEOUT).read()


@pytest.mark.parametrize("token", [None, "wrong", "", "alice's token "])
async def test_nobody_else_is_let_in(world: World, token: str | None) -> None:
    stranger = world.caller(token)
    with pytest.raises(Unauthenticated, match="show the cluster's token"):
        await stranger.hello(timeout_s=TIMEOUT)
    stranger._greeted = True
    for call in (
        stranger.renew([], 1.0, timeout_s=TIMEOUT),
        anext(stranger.watch([], None, timeout_s=TIMEOUT)),
    ):
        with pytest.raises(Unauthenticated):
            await call


async def test_health_is_told_on_both_ports_and_turns_while_draining(world: World) -> None:
    checks = {}
    for name, address in (("all", world.address), ("admin", world.server.admin_address)):
        channel = grpc.aio.insecure_channel(address)
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service=methods.CONTROL)
        watching = stub.Watch(asked, timeout=TIMEOUT)
        checks[name] = [(await watching.read()).status]
        await world.server._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        checks[name].append((await watching.read()).status)
        await world.server._set_health(health_pb2.HealthCheckResponse.SERVING)
        watching.cancel()
        await channel.close()
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert checks == {"all": [serving, not_serving], "admin": [serving, not_serving]}


async def test_a_token_is_in_no_log_whatever_fails(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Console logs show the locals of every frame of a traceback."""

    async def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("a bug of ours")

    cluster = world.caller(CLUSTER)
    await cluster.hello(timeout_s=TIMEOUT)
    monkeypatch.setattr(world.driver, "status", fail)
    monkeypatch.setattr(world.driver, "hello", fail)
    for call in (cluster.status(timeout_s=TIMEOUT), cluster.hello(timeout_s=TIMEOUT)):
        with pytest.raises(Unavailable, match="see its log"):
            await call
    said = capsys.readouterr()
    assert (said.out + said.err).count("a bug of ours") >= 2
    assert CLUSTER not in said.out + said.err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tenants": TENANTS}, "tenants need a cluster token"),
        ({"token": "c", "tenants": TENANTS[:1]}, "only seen with mTLS"),
        ({"admin_host": "0.0.0.0"}, "configure TLS"),
        ({"admin_host": "0.0.0.0", "insecure": True}, "needs the cluster's token"),
    ],
)
def test_a_server_that_could_not_tell_its_callers_does_not_start(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig(**changes)


# -- certificates ---------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that lives in a folder."""

    def __init__(self, folder: Path) -> None:
        self._ca, self._folder = trustme.CA(), folder
        self.root = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.root))

    def issue(self, name: str, common_name: str | None = None) -> tuple[Path, Path]:
        """Paths of a certificate and its key."""
        made = self._ca.issue_cert(name, common_name=common_name)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        made.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        return cert, key

    def shard(self, *, mutual: bool) -> TlsFiles:
        cert, key = self.issue("127.0.0.1")
        return TlsFiles(cert, key, self.root if mutual else None)

    def client(self, name: str, common_name: str | None = None) -> ClientTls:
        return ClientTls(self.root, *self.issue(name, common_name))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_a_client_certificate_names_its_tenant(authority: Authority) -> None:
    world = await start(tls=authority.shard(mutual=True))
    alice = world.caller(None, authority.client("alice.example"))
    by_common_name = world.caller(None, authority.client("b1.example", common_name="bob.example"))
    cluster = world.caller("cluster's token", authority.client("router.example"))
    assert await own(alice) == await own(cluster, "alice")
    assert await own(by_common_name) == await own(cluster, "bob")
    with pytest.raises(PermissionDenied):
        await alice.status(timeout_s=TIMEOUT)
    with pytest.raises(PermissionDenied, match="not tenant alice's"):
        await alice.listing(await own(by_common_name), None, 0, 1, timeout_s=TIMEOUT)
    for token, name in ((None, "carol.example"), ("bob's token", "alice2.example"), ("wrong", "a3.example")):
        stranger = world.caller(token, authority.client(name, "alice.example" if token else None))
        with pytest.raises(Unauthenticated):
            await stranger.hello(timeout_s=TIMEOUT)
    await world.close()


async def test_a_shard_with_mtls_lets_nobody_in_without_a_certificate_it_trusts(
    authority: Authority, tmp_path: Path
) -> None:
    world = await start(tls=authority.shard(mutual=True))
    (tmp_path / "other").mkdir()
    forged = Authority(tmp_path / "other").client("alice.example")
    for tls in (ClientTls(authority.root), ClientTls(authority.root, forged.cert, forged.key), None):
        for admin in (False, True):
            with pytest.raises(Unavailable):
                await world.caller("cluster's token", tls, admin=admin).hello(timeout_s=TIMEOUT)
    await world.close()


async def test_a_store_client_speaks_tls(authority: Authority, tmp_path: Path) -> None:
    driver = new_driver()
    server = ShardServer(driver, ServerConfig(token="t", tls=authority.shard(mutual=False)))
    topology = Topology(1, (ShardEntry(SHARD, await server.start()),))
    async with await StoreClient.connect(topology, token="t", tls=ClientTls(authority.root)) as client:
        session = await client.open(SPEC, E1)
        made = chain(session.namespace, 1)
        await put(driver, made, [0], E1)
        found = await session.match(made.keys, owner="r", lease_s=5.0, timeout_s=TIMEOUT)
        assert len(found.blocks) == 1
    (tmp_path / "other").mkdir()
    elsewhere = ClientTls(Authority(tmp_path / "other").root)
    async with await StoreClient.connect(topology, token="t", tls=elsewhere) as fooled:
        with pytest.raises(Unavailable):
            await fooled.open(SPEC, E1)
    await server.stop(0)


def test_a_clients_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give both"):
        ClientTls(cert=tmp_path / "c.pem")
    with pytest.raises(ConfigError, match=r"ca\.pem cannot be read"):
        ClientTls(ca=tmp_path / "ca.pem").channel_credentials()
    assert peer_names({"x509_common_name": [b"a"], "x509_subject_alternative_name": [b"\xff", b"b"]}) == {
        "a",
        "b",
        "\ufffd",
    }


async def test_a_call_without_a_message_of_its_type_is_an_invalid_argument(world: World) -> None:
    alice = world.caller("alice's token")
    call: Any = alice._control.unary_unary(methods.MATCH.path)
    with pytest.raises(grpc.aio.AioRpcError, match="are no MatchRequest") as refused:
        await call(b"\xff\xff", metadata=alice._metadata, timeout=TIMEOUT)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
