"""Who may map the arena, and what a writer can do to the shard: nothing but write what it can vouch for."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.nouns import Quality, Refusal, TxnId
from kvstore.tiers.arena import ArenaTier
from kvstore.tiers.copying import fill
from kvstore.transport.base import BlockOffer
from kvstore.transport.shm import packets, server
from kvstore.transport.shm.client import NotHere, attach
from kvstore.transport.shm.memory import Unsafe, map_readonly, new_window
from tests.kvstore.conftest import TOKEN
from tests.kvstore.oracle import FRAME_NBYTES, TIMEOUT, chain, frame, new_driver
from tests.kvstore.transport.shm.conftest import E1, Near, all_gone

WINDOW = 1 << 16


class Talk:
    """A client that says what it likes."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    @classmethod
    async def with_(cls, near: Near, token: str = TOKEN) -> Talk:
        talk = cls(await packets.connect(near.server.name))
        await packets.send(talk.socket, {"v": server.VERSION, "token": token})
        return talk

    async def hear(self) -> Any:
        async with asyncio.timeout(TIMEOUT):
            message, descriptors = await packets.receive(self.socket)
        packets.close_all(descriptors)
        return message

    async def say(self, message: object, descriptors: tuple[int, ...] = ()) -> Any:
        await packets.send(self.socket, message, descriptors)
        return await self.hear()


async def refused(talk: Talk) -> None:
    """The shard ends the conversation."""
    try:
        while True:
            await talk.hear()
    except packets.Closed:
        talk.socket.close()


@pytest.mark.parametrize("token", ["", "another", TOKEN + "x", "\u00e9"])
async def test_a_wrong_token_opens_nothing(near: Near, token: str) -> None:
    await refused(await Talk.with_(near, token))
    with pytest.raises(NotHere):
        await attach(near.server.name, token, near.served.driver.config.incarnation, TIMEOUT)
    assert near.server.counters["shm:refused"] == 2


async def test_another_user_is_refused_by_both_sides(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "peer_uid", lambda _: os.getuid() + 1)
    with pytest.raises(NotHere, match="another user"):
        await attach(near.server.name, TOKEN, near.served.driver.config.incarnation, TIMEOUT)
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plain.connect(near.server.name)
    plain.setblocking(False)
    await packets.send(plain, {"v": server.VERSION, "token": TOKEN})
    await refused(Talk(plain))


async def test_who_says_nothing_is_not_waited_for(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GREETING_S", 0.05)
    await refused(Talk(await packets.connect(near.server.name)))


async def test_connections_are_bounded(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", near.server.connections + 1)
    first = await Talk.with_(near)
    assert (await first.hear())["slots"] == near.arena.geometry.slots
    await refused(Talk(await packets.connect(near.server.name)))
    assert near.server.counters["shm:over_limit"] == 1
    first.socket.close()


async def opened(near: Near) -> tuple[Talk, Any]:
    """A client with a window, and its writable view of it."""
    talk = await Talk.with_(near)
    await talk.hear()
    descriptor, mapped = new_window(WINDOW)
    assert await talk.say({"op": "window", "nbytes": WINDOW}, (descriptor,)) == {}
    os.close(descriptor)
    return talk, mapped


async def begin(near: Near, first_token: int = 1000) -> tuple[TxnId, bytes, bytes]:
    made = chain(near.session.namespace, 1, first_token)
    offer = BlockOffer(made.keys[0], made.parent(0), 0, made.placement(0), FRAME_NBYTES)
    opened = await near.served.driver.begin(
        near.session.namespace, E1, Quality.LOSSLESS, [offer], "w", 10.0, os.urandom(16), timeout_s=TIMEOUT
    )
    header, body = frame(made, 0, E1)
    return opened.txn, header, bytes(body)


def write_of(txn: int, offset: int = 0, nbytes: int = FRAME_NBYTES, index: int = 0) -> dict[str, object]:
    columns = {"indexes": [index], "offsets": [offset], "nbytes": [nbytes]}
    return {"op": "write", "txn": txn, "timeout_ms": 1000, **columns}


async def test_a_frame_in_the_window_is_stored(near: Near) -> None:
    talk, mapped = await opened(near)
    txn, header, body = await begin(near)
    mapped[100 : 100 + FRAME_NBYTES] = header + body
    assert await talk.say(write_of(txn, 100)) == {"refusals": [""]}
    done = await near.served.driver.commit(txn, None, timeout_s=TIMEOUT)
    assert not isinstance(done.blocks[0], Refusal)
    talk.socket.close()


async def test_what_a_writer_changes_under_the_copy_is_refused(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed in the middle of the shard's copy: it judges what it has, not what was sent."""
    talk, mapped = await opened(near)
    txn, header, body = await begin(near)
    mapped[:FRAME_NBYTES] = header + body

    def fill_slowly(room: memoryview, *pieces: Any) -> None:
        mapped[FRAME_NBYTES - 1] ^= 1
        fill(room, *pieces)
        mapped[FRAME_NBYTES - 1] ^= 1

    monkeypatch.setattr("kvstore.arrival.fill", fill_slowly)
    assert await talk.say(write_of(txn)) == {"refusals": [Refusal.CHECKSUM.value]}
    done = await near.served.driver.commit(txn, None, timeout_s=TIMEOUT)
    assert list(done.blocks) == [Refusal.CHECKSUM]
    talk.socket.close()
    near.arena.check_integrity()


async def test_what_a_writer_changes_after_its_answer_changes_nothing(near: Near) -> None:
    talk, mapped = await opened(near)
    txn, header, body = await begin(near)
    mapped[:FRAME_NBYTES] = header + body
    assert await talk.say(write_of(txn)) == {"refusals": [""]}
    mapped[:] = bytes(WINDOW)
    done = await near.served.driver.commit(txn, None, timeout_s=TIMEOUT)
    ref = done.blocks[0]
    assert not isinstance(ref, Refusal)
    assert bytes(near.arena._frames[ref.slot].frame) == header + body
    talk.socket.close()


async def test_a_transaction_that_is_gone_is_an_error_by_name(near: Near) -> None:
    talk, _ = await opened(near)
    assert (await talk.say(write_of(12345)))["error"] == "LeaseExpired"
    talk.socket.close()


@pytest.mark.parametrize(
    "message",
    [
        write_of(1, offset=WINDOW),
        write_of(1, nbytes=WINDOW + 1),
        write_of(1, nbytes=10),
        write_of(-1),
        {**write_of(1), "indexes": [0, 1]},
        {**write_of(1), "offsets": ["0"]},
        {**write_of(1), "offsets": [True]},
        {**write_of(1), "timeout_ms": 10**9},
        {"op": "window", "nbytes": WINDOW},
        {"op": "shutdown"},
        ["write"],
        None,
    ],
    ids=str,
)
async def test_nonsense_ends_the_conversation_and_nothing_else(near: Near, message: object) -> None:
    talk, _ = await opened(near)
    await packets.send(talk.socket, message)
    await refused(talk)
    again, _ = await opened(near)
    again.socket.close()


scalars = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.text(max_size=8), st.binary(max_size=8), st.none(), st.booleans()
)
fields = st.sampled_from(["op", "v", "token", "nbytes", "indexes", "offsets", "txn", "timeout_ms"])
messages = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields, inner, max_size=6),
    max_leaves=12,
)


@given(data=st.binary(min_size=1, max_size=200) | messages.map(msgpack.packb), greeted=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_packet_is_answered_or_ends_the_conversation(data: bytes, greeted: bool) -> None:
    asyncio.run(_fuzzed(data, greeted))


async def _fuzzed(data: bytes, greeted: bool) -> None:
    driver = new_driver()
    listening = server.ShmServer(driver, ArenaTier(1 << 16, 16), driver.config.incarnation, lambda _: True)
    listening.start()
    connected = await packets.connect(listening.name)
    if greeted:
        await packets.send(connected, {"v": server.VERSION, "token": ""})
        _, descriptors = await packets.receive(connected)
        packets.close_all(descriptors)
    connected.send(data)
    connected.shutdown(socket.SHUT_WR)
    await all_gone(listening)
    connected.close()
    assert not any(
        task.done() and not task.cancelled() and task.exception() for task in listening._connections
    ), "it broke the shard"
    await listening.stop()


async def test_memory_that_may_vanish_is_not_mapped() -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, WINDOW)
    with pytest.raises(Unsafe, match="shrink"):
        map_readonly(unsealed, WINDOW)
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(unsealed, 0)
    for nbytes in (0, WINDOW + 1):
        with pytest.raises(Unsafe, match="bytes of a memory"):
            map_readonly(unsealed, nbytes)
    with map_readonly(unsealed, WINDOW) as mapped, pytest.raises(TypeError):
        mapped[0] = 1
    os.close(unsealed)
    ends = os.pipe()
    with pytest.raises(Unsafe):
        map_readonly(ends[0], 1)
    for end in ends:
        os.close(end)


def test_only_hugetlbfs_is_refused_for_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel keeps shared memory in huge pages (shmem_enabled), st_blksize is theirs: no reason."""
    ordinary, _ = new_window(WINDOW)
    fields = list(os.fstat(ordinary))
    huge_blocks = os.stat_result(fields, {"st_blksize": 2 << 20})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", lambda _: huge_blocks)
        map_readonly(ordinary, WINDOW).close()
    os.close(ordinary)
    try:
        huge = os.memfd_create("x", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no hugetlbfs")
    fcntl.fcntl(huge, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(Unsafe, match="huge pages"):
        map_readonly(huge, 1)
    os.close(huge)


async def test_a_window_that_may_shrink_is_refused(near: Near) -> None:
    talk = await Talk.with_(near)
    await talk.hear()
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, WINDOW)
    await packets.send(talk.socket, {"op": "window", "nbytes": WINDOW}, (descriptor,))
    os.close(descriptor)
    await refused(talk)
