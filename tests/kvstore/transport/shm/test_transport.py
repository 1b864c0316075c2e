"""Shared memory is found out, never configured, and nothing fails for want of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from kvstore import failpoints
from kvstore.answers import PublishBlock, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.hashing import KeyChain
from kvstore.nouns import BlockRef, KVLayout, MissReason, NamespaceSpec, PinnedBlock, Quality, TxnId
from kvstore.tiers.arena import ArenaTier
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.landing import Landing
from kvstore.transport.shm import client as client_module
from kvstore.transport.shm import packets
from kvstore.transport.shm import transport as transport_module
from kvstore.transport.shm.client import HALF_NBYTES, Attachment, NotHere, _batches, _places, attach, fits
from kvstore.transport.shm.transport import LARGE_NBYTES, _read_into
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import SPEC, TIMEOUT, chain
from tests.kvstore.transport.shm.conftest import E1, Near, all_gone, blocks_of, publish


async def reads(near: Near) -> None:
    buffers = near.buffers()
    got = await near.session.read_into(near.blocks, buffers, timeout_s=TIMEOUT)
    assert all(isinstance(item, VerifiedBlock) for item in got), got
    assert [bytes(buffer) for buffer in buffers] == [near.expected(i) for i in range(4)]
    streamed = [item async for item in near.session.read(near.blocks, timeout_s=TIMEOUT)]
    assert all(isinstance(item, VerifiedBlock) for item in streamed), streamed


async def test_a_client_of_this_host_finds_the_memory_by_itself(near: Near) -> None:
    assert near.transport.shares_memory
    assert near.client.counters["shm:attached"] == 1
    assert near.client.counters["shm:written_bytes"] == near.server.counters["shm:written_bytes"] > 0
    await reads(near)


async def test_grpc_can_be_asked_for(near: Near) -> None:
    topology = near.client.topology
    async with await StoreClient.connect(topology, token=TOKEN, shared_memory=False) as far:
        near.session = await far.open(SPEC, E1)
        await reads(near)
        assert not [name for name in far.counters if name.startswith("shm:")]


@pytest.mark.parametrize("name", ["", "kvstrata-" + "0" * 32, "something-else"])
async def test_where_nobody_listens_everything_goes_over_grpc(near: Near, name: str) -> None:
    near.served.server._service.control.shm_socket = name
    await near.transport.hello(timeout_s=TIMEOUT)
    assert not near.transport.shares_memory
    assert near.client.counters["shm:not_here"] == bool(name)
    await reads(near)
    await publish(near.session, chain(near.session.namespace, 2, 500))


async def test_an_arena_that_cannot_be_shared_is_served_over_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArenaTier, "share", lambda _: None)
    served = await Served.start("shard-0")
    assert served.server._service.control.shm_socket == ""
    topology = Topology(1, (ShardEntry(served.driver.shard, served.address),))
    async with await StoreClient.connect(topology, token=TOKEN) as client:
        session = await client.open(SPEC, E1)
        await publish(session, chain(session.namespace, 2))
        assert not [name for name in client.counters if name.startswith("shm:")]
    await served.stop()


async def test_when_the_shard_lets_go_frames_go_over_grpc(near: Near) -> None:
    await near.server.stop()
    async with asyncio.timeout(TIMEOUT):
        while near.transport.shares_memory:  # noqa: ASYNC110 - until the socket's end is heard
            await asyncio.sleep(0)
    await reads(near)
    await publish(near.session, chain(near.session.namespace, 2, 500))


async def test_a_shard_in_another_life_is_not_read(near: Near) -> None:
    reader = near.transport._reader
    near.client._peers.counters.clear()
    await near.served.restart()
    got = await near.session.read_into(near.blocks, near.buffers(), timeout_s=TIMEOUT)
    assert {getattr(item, "reason", None) for item in got} <= {
        MissReason.STALE_REFERENCE,
        MissReason.SHARD_UNAVAILABLE,
    }
    await near.session.match(near.made.keys, owner="r", lease_s=1.0, timeout_s=TIMEOUT)
    assert near.transport._reader is not reader


async def test_another_shards_memory_is_not_taken_for_this_ones(near: Near) -> None:
    incarnation = near.served.driver.config.incarnation
    with pytest.raises(NotHere, match="another shard"):
        await attach(near.server.name, TOKEN, type(incarnation)(incarnation ^ 1), TIMEOUT)


async def test_a_write_whose_answer_is_lost_goes_over_grpc(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = packets.send

    async def hang_up(connected: object, message: object, descriptors: object = ()) -> None:
        await send(connected, message, descriptors)  # type: ignore[arg-type]
        if isinstance(message, dict) and message.get("op") == "write":
            near.transport._detach()

    monkeypatch.setattr(client_module.packets, "send", hang_up)  # type: ignore[attr-defined]
    await publish(near.session, chain(near.session.namespace, 2, 500))
    assert near.client.counters["shm:lost"] == 1
    monkeypatch.undo()
    await all_gone(near.server)


async def test_a_write_past_its_deadline_ends_the_attachment(near: Near) -> None:
    attached = near.transport._attached
    assert attached is not None
    stalled = asyncio.Event()
    made = chain(near.session.namespace, 1, 700)
    with failpoints.armed("storage.write", failpoints.Delay(stalled)):
        answers = (
            await near.session.publish(
                blocks_of(made), quality=Quality.LOSSLESS, owner="w", pin_for_s=None, timeout_s=0.3
            )
        ).blocks
    assert not isinstance(answers[0], PinnedBlock)
    assert attached.reader is None, "its answer may still come: nobody may take it for another's"
    stalled.set()
    await near.client._peers.finish_errands()
    await all_gone(near.server)


async def test_blocks_larger_than_a_thread_hop_and_a_chunk_arrive_whole() -> None:
    """Two threads fill the buffers, the window is used in turns, and gRPC says the same."""
    layout = KVLayout(layers=1, head_begin=0, head_end=1280, head_dim=16, dtype="float32")  # 5 MiB
    spec = NamespaceSpec("large", layout, bytes(16))
    served = await Served.start("shard-0", frames=1 << 20)
    topology = Topology(1, (ShardEntry(served.driver.shard, served.address),))
    rng = np.random.default_rng(0)
    for shared_memory in (True, False):
        async with await StoreClient.connect(topology, token=TOKEN, shared_memory=shared_memory) as client:
            session = await client.open(spec, E1)
            made = KeyChain(session.namespace, layout.block_tokens)
            made.extend(range(shared_memory, shared_memory + 7 * layout.block_tokens))
            payloads = [rng.integers(0, 256, layout.block_nbytes, dtype=np.uint8) for _ in made.keys]
            blocks = [
                PublishBlock(key, made.parent(i), i, made.placement(i), payloads[i].data)
                for i, key in enumerate(made.keys)
            ]
            done = await session.publish(
                blocks, quality=Quality.LOSSLESS, owner="w", pin_for_s=30.0, timeout_s=30.0
            )
            pinned = [block for block in done.blocks if isinstance(block, PinnedBlock)]
            assert len(pinned) == 7
            buffers = [np.zeros(layout.block_nbytes, dtype=np.uint8) for _ in pinned]
            got = await session.read_into(pinned, buffers, timeout_s=30.0)
            assert all(isinstance(item, VerifiedBlock) for item in got)
            assert all((a == b).all() for a, b in zip(buffers, payloads, strict=True))
            assert (client.counters["shm:written_bytes"] > 0) == shared_memory
    await served.stop()


@pytest.mark.parametrize("how", ["cancelled", "past its deadline"])
async def test_a_writer_that_only_waited_for_its_turn_ends_nothing(near: Near, how: str) -> None:
    attached = near.transport._attached
    assert attached is not None
    async with attached._writing:
        waiting = asyncio.ensure_future(attached.write(TxnId(1), [], 0.05))
        await asyncio.sleep(0.01)
        if how == "cancelled":
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else Unavailable):
            await waiting
    await publish(near.session, chain(near.session.namespace, 2, 500))
    assert near.transport.shares_memory
    assert near.client.counters["shm:lost"] == 0


async def test_what_was_lost_is_attached_again_but_not_at_once(near: Near) -> None:
    transport = near.transport
    assert transport._attached is not None
    transport._attached.close()
    await all_gone(near.server)
    await reads(near)
    assert transport._reader is None, "every call would say hello while the shard refuses us"
    transport._again_at = 0.0
    await asyncio.gather(*(transport.status(timeout_s=TIMEOUT) for _ in range(5)))
    assert transport.shares_memory
    assert near.client.counters["shm:attached"] == 2
    await reads(near)


async def test_many_first_calls_attach_once(near: Near) -> None:
    transport = near.transport
    await transport.hello(timeout_s=TIMEOUT)
    await asyncio.sleep(0)
    transport._detach()
    await all_gone(near.server)
    transport._greeted = False
    near.client.counters.clear()
    calls = [asyncio.ensure_future(transport.status(timeout_s=TIMEOUT)) for _ in range(40)]
    await asyncio.sleep(0)
    calls[0].cancel()  # it is the one who says hello: that harms no other
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one).__name__ for one in done] == ["CancelledError"] + ["ShardStatus"] * 39
    assert near.client.counters["shm:attached"] == near.server.connections == 1
    await asyncio.gather(*(transport.hello(timeout_s=TIMEOUT) for _ in range(5)))
    transport._detach()
    await all_gone(near.server)
    assert near.server.connections == 0, "an attachment that nobody has any more was left open"


async def test_a_call_waits_for_anothers_hello_within_its_own_deadline(near: Near) -> None:
    near.transport._greeted = False
    async with near.transport._greeting:
        with pytest.raises(DeadlineExceeded, match="in time"):
            await near.transport.status(timeout_s=0.05)
    await near.transport.status(timeout_s=TIMEOUT)


async def test_who_attaches_while_the_transport_is_closed_lets_go(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def attach_late(*asked: object) -> Attachment:
        attached = await attach(*asked)  # type: ignore[arg-type]
        await near.transport.close()
        return attached

    monkeypatch.setattr(transport_module, "attach", attach_late)
    await near.transport.hello(timeout_s=TIMEOUT)
    assert not near.transport.shares_memory
    await all_gone(near.server)
    assert near.server.connections == 0


class SlowReader:
    """Its first thread copies until it is let go on; the second, if there is one, fails at once."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.started, self.go_on, self.done = asyncio.Event(), threading.Event(), False

    def read_into(self, refs: Sequence[BlockRef], landing: Landing, rows: Sequence[int]) -> list[int]:
        if rows[0]:
            raise MemoryError("the other half")
        self.loop.call_soon_threadsafe(self.started.set)
        self.go_on.wait(5)
        self.done = True
        return []


@pytest.mark.parametrize("rows", [[0], [0, 1]], ids=["cancelled twice", "one of two threads fails"])
async def test_a_read_ends_when_no_thread_writes_into_its_buffers(rows: list[int]) -> None:
    reader = SlowReader()
    landing = Landing([memoryview(bytearray(LARGE_NBYTES)) for _ in rows])
    refs = [BlockRef(*[0] * len(BlockRef._fields))] * len(rows)  # type: ignore[arg-type]
    reading = asyncio.ensure_future(_read_into(reader, refs, landing, rows))  # type: ignore[arg-type]
    await reader.started.wait()
    for _ in range(3):
        if len(rows) == 1:
            reading.cancel()
        await asyncio.sleep(0.02)
        assert not reading.done(), "the buffers are the caller's again and a thread still writes"
    reader.go_on.set()
    with pytest.raises(asyncio.CancelledError if len(rows) == 1 else MemoryError):
        await reading
    assert reader.done


def test_frames_are_cut_into_halves_of_the_window_in_order() -> None:
    sizes = [HALF_NBYTES - 256, 1, 5000, HALF_NBYTES - 256]
    frames = [(i, bytes(256), memoryview(bytes(n))) for i, n in enumerate(sizes)]
    batches = _batches(frames)
    assert [[index for index, _, _ in batch] for batch in batches] == [[0], [1, 2], [3]]
    assert _places(batches[1], HALF_NBYTES) == [HALF_NBYTES, HALF_NBYTES + 4096]
    assert fits(frames)
    assert not fits([(0, bytes(256), memoryview(bytes(HALF_NBYTES)))])
    assert not fits([(0, b"", memoryview(b"x"))])
