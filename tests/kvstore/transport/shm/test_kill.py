"""kill -9 of either side leaves nothing behind: no map, no descriptor, no socket, no file."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.answers import VerifiedBlock
from kvstore.client import StoreClient
from kvstore.nouns import Quality, ShardId
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import BlockOffer
from kvstore.transport.shm.transport import SameHostTransport
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import FRAME_NBYTES, SPEC, TIMEOUT, chain, epoch, frame
from tests.kvstore.transport.shm.conftest import all_gone, publish

Pipe = multiprocessing.connection.Connection
Process = multiprocessing.process.BaseProcess
SPAWN = multiprocessing.get_context("spawn")
E1 = epoch(1)


def maps_of(what: str) -> int:
    gc.collect()  # arenas of earlier tests
    return Path("/proc/self/maps").read_text().count(what)


def descriptors_of(what: str) -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += what in os.readlink(entry)
        except OSError:
            continue
    return found


def listening(name: str) -> bool:
    return name.replace("\0", "@") in Path("/proc/net/unix").read_text()


def shard_process(pipe: Pipe) -> None:
    async def run() -> None:
        served = await Served.start("shard-0")
        assert served.server._shm is not None
        pipe.send((served.address, served.server._shm.name))
        await asyncio.Event().wait()

    asyncio.run(run())


def client_process(pipe: Pipe, address: str) -> None:
    """Writes one of two frames of a transaction, and stays."""

    async def run() -> None:
        transport = SameHostTransport(ShardId("shard-0"), address, TOKEN)
        namespace = await transport.open_namespace(SPEC, "t", timeout_s=TIMEOUT)
        await transport.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)
        made = chain(namespace, 2)
        offers = [
            BlockOffer(k, made.parent(i), i, made.placement(i), FRAME_NBYTES) for i, k in enumerate(made.keys)
        ]
        opened = await transport.begin(
            namespace, E1, Quality.LOSSLESS, offers, "w", 60.0, bytes(16), timeout_s=TIMEOUT
        )
        assert await transport.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT) == [None]
        pipe.send(transport.shares_memory)
        await asyncio.Event().wait()

    asyncio.run(run())


async def started(
    target: Callable[..., None], *args: object
) -> tuple[multiprocessing.process.BaseProcess, Any]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return process, await asyncio.to_thread(ours.recv)


async def let_go(transport: SameHostTransport) -> None:
    """Until the client has heard that the shard is gone."""
    async with asyncio.timeout(TIMEOUT):
        while transport.shares_memory:  # noqa: ASYNC110 - the socket's end comes from the kernel
            await asyncio.sleep(0)


async def killed(process: Process) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.to_thread(process.join, TIMEOUT)


async def test_a_writer_killed_in_the_middle_leaves_the_shard_nothing() -> None:
    served = await Served.start("shard-0")
    server = served.server._shm
    assert server is not None
    before = maps_of("kvstrata-window")
    process, shares = await started(client_process, served.address)
    assert shares is True
    assert maps_of("kvstrata-window") == before + 1, "the shard maps the writer's window"
    await killed(process)
    await all_gone(server)
    assert maps_of("kvstrata-window") == before
    assert descriptors_of("kvstrata-window") == 0
    assert (await served.driver.status(timeout_s=TIMEOUT)).staged_nbytes == 2 * FRAME_NBYTES
    served.driver._clock = _Later()  # its lease ends
    for _ in range(3):
        served.driver.reap()
    served.driver.check_integrity()
    await served.stop()


class _Later:
    """A minute and more from now, and every look a little later: no pause of the shard."""

    def __init__(self) -> None:
        self._now = asyncio.get_running_loop().time() + 1.0

    def now(self) -> float:
        self._now += 1.0
        return self._now


async def test_a_shard_killed_under_its_readers_leaves_them_nothing() -> None:
    before = maps_of("kvstrata-arena"), descriptors_of("kvstrata-arena")
    process, told = await started(shard_process)
    address, name = told
    topology = Topology(1, (ShardEntry(ShardId("shard-0"), address),))
    async with await StoreClient.connect(topology, token=TOKEN) as client:
        session = await client.open(SPEC, E1)
        made = chain(session.namespace, 4)
        await publish(session, made)
        found = await session.match(made.keys, owner="r", lease_s=60.0, timeout_s=TIMEOUT)
        transport = client._peers.transports[ShardId("shard-0")]
        assert isinstance(transport, SameHostTransport)
        assert transport.shares_memory
        assert maps_of("kvstrata-arena") == before[0] + 1
        assert descriptors_of("kvstrata-arena") == before[1] + 1, "the map's own, and none besides"
        assert listening(name)
        await killed(process)
        await let_go(transport)
        buffers = [bytearray(FRAME_NBYTES - 256) for _ in found.blocks]
        got = await session.read_into(found.blocks, buffers, timeout_s=TIMEOUT)
        assert not any(isinstance(item, VerifiedBlock) for item in got), "a dead shard serves nothing"
        assert not listening(name)
        assert maps_of("kvstrata-arena") == before[0]
        assert descriptors_of("kvstrata-arena") == before[1]
        assert descriptors_of("kvstrata-window") == 0
