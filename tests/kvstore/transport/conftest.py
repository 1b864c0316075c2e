"""One shard behind a port, and a transport to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvstore.nouns import ShardId
from kvstore.transport.grpc.client import GrpcTransport
from tests.kvstore.conftest import TOKEN, Served


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    shard = await Served.start("shard-0")
    yield shard
    await shard.stop()


@pytest.fixture
async def transport(served: Served) -> AsyncIterator[GrpcTransport]:
    made = GrpcTransport(ShardId("shard-0"), served.address, TOKEN)
    yield made
    await made.close()
