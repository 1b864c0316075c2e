"""A client that is told to do without shared memory reads the same over gRPC, by every way to come by one."""

from __future__ import annotations

import pytest

from kvstore.client import StoreClient
from kvstore.integrations.vllm.config import read_config
from kvstore.integrations.vllm.store_side import connect_as
from tests.kvstore.conftest import TOKEN
from tests.kvstore.oracle import SPEC, TIMEOUT
from tests.kvstore.transport.shm.conftest import E1, Near


@pytest.mark.parametrize("shared", [True, False], ids=["shm", "grpc"])
@pytest.mark.parametrize("by", ["address", "connector"])
async def test_bytes_go_the_way_that_was_said(near: Near, by: str, shared: bool) -> None:
    address = near.served.address
    if by == "address":
        client = await StoreClient.connect_to([address], token=TOKEN, shared_memory=shared)
    else:
        said = {"store": [address], "token": TOKEN, "shared_memory": shared}
        client = await connect_as(read_config(said))()
    async with client:
        session = await client.open(SPEC, E1)
        buffers = near.buffers()
        await session.read_into(near.blocks, buffers, timeout_s=TIMEOUT)
    assert [bytes(buffer) for buffer in buffers] == [near.expected(i) for i in range(len(near.blocks))]
    assert client.counters["shm:read_blocks"] == (len(near.blocks) if shared else 0)
