"""One shard behind a port, whose memory its clients may map, and blocks in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from kvstore.answers import PublishBlock
from kvstore.client import StoreClient
from kvstore.hashing import KeyChain
from kvstore.nouns import PinnedBlock, Quality
from kvstore.session import StoreSession
from kvstore.tiers.arena import ArenaTier
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.shm.server import ShmServer
from kvstore.transport.shm.transport import SameHostTransport
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import LAYOUT, SPEC, TIMEOUT, chain, epoch, payload

E1 = epoch(1)


@dataclass
class Near:
    """A client of one shard on this host, its session, and the blocks of one chain, pinned."""

    served: Served
    client: StoreClient
    session: StoreSession
    made: KeyChain
    blocks: list[PinnedBlock]

    @property
    def arena(self) -> ArenaTier:
        storage = self.served.driver.storage
        assert isinstance(storage, ArenaTier)
        return storage

    @property
    def server(self) -> ShmServer:
        assert self.served.server._shm is not None
        return self.served.server._shm

    @property
    def transport(self) -> SameHostTransport:
        found = self.client._peers.transports[self.served.driver.shard]
        assert isinstance(found, SameHostTransport)
        return found

    def buffers(self) -> list[bytearray]:
        return [bytearray(LAYOUT.block_nbytes) for _ in self.blocks]

    def expected(self, i: int) -> bytes:
        return payload(self.made.keys[i], E1)


@pytest.fixture
async def near() -> AsyncIterator[Near]:
    served = await Served.start("shard-0")
    topology = Topology(1, (ShardEntry(served.driver.shard, served.address),))
    async with await StoreClient.connect(topology, token=TOKEN) as client:
        session = await client.open(SPEC, E1)
        made = chain(session.namespace, 4)
        await publish(session, made)
        found = await session.match(made.keys, owner="r", lease_s=60.0, timeout_s=TIMEOUT)
        yield Near(served, client, session, made, list(found.blocks))
    await served.stop()
    served.driver.check_integrity()


def blocks_of(made: KeyChain) -> list[PublishBlock]:
    return [
        PublishBlock(key, made.parent(i), i, made.placement(i), memoryview(payload(key, E1)))
        for i, key in enumerate(made.keys)
    ]


async def publish(session: StoreSession, made: KeyChain) -> None:
    done = await session.publish(
        blocks_of(made), quality=Quality.LOSSLESS, owner="w", pin_for_s=None, timeout_s=TIMEOUT
    )
    assert all(isinstance(block, PinnedBlock) for block in done.blocks), done


async def all_gone(server: ShmServer) -> None:
    """Until the shard has let go of every client."""
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(*list(server._connections), return_exceptions=True)
