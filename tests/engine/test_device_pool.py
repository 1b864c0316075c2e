"""Promise: a block is the same bytes in a device's pool as outside it, whoever reads and however late."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.device import CudaDevice, Device, HostDevice
from engine.device_pool import RING_BUFFERS, DeviceStorage
from engine.pool import KVPool
from kvstore.frame import decode_frame
from kvstore.nouns import BlockMeta, KVLayout, Quality
from kvstore.tiers.base import Place
from kvstore.tiers.device import DeviceTier
from kvstore.tiers.pool_slots import PoolSlots
from tests.engine.edge_source import EPOCH, LAYOUT, NAMESPACE, chain_of, payload_of
from tests.engine.late_device import LateDevice
from tests.engine.test_pool import random_payload


def pool_on(device: Device, layout: KVLayout = LAYOUT, n_slots: int = 12) -> KVPool:
    return KVPool(layout, n_slots, DeviceStorage(layout, n_slots, device))


def a_gpu() -> CudaDevice:
    return CudaDevice(torch.device("cuda"))


@pytest.fixture(
    params=[
        HostDevice,
        LateDevice,
        pytest.param(
            a_gpu,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_bytes_come_back_as_they_went_in(device: Device, dtype: str) -> None:
    layout = KVLayout(2, 0, 3, 8, dtype, block_tokens=4)
    pool = pool_on(device, layout)
    block, tail = random_payload(layout.block_nbytes), random_payload(3 * layout.token_nbytes, seed=1)
    pool.write_block(1, block)
    pool.write_tail(3, tail, 3)
    assert pool.read_block(1).tobytes() == block
    assert pool.read_tail(3, 3).tobytes() == tail
    assert not pool.read_block(2).any()
    assert [copy.tobytes() for copy in pool.begin_read([3, 1]).take()][1] == block


def test_the_bytes_outside_are_in_the_frames_order(device: Device) -> None:
    layout = KVLayout(layers=2, head_begin=0, head_end=3, head_dim=8, dtype="float32", block_tokens=4)
    pool = pool_on(device, layout, 3)
    expected = torch.arange(2 * 2 * 4 * 3 * 8, dtype=torch.float32).view(2, 2, 4, 3, 8)
    for layer in range(2):
        pool.keys(layer)[8:12] = expected[layer, 0]
        pool.values(layer)[8:12] = expected[layer, 1]
    assert pool.read_block(2).tobytes() == expected.numpy().tobytes()
    (copied,) = pool.begin_read([2]).take()
    assert copied.tobytes() == expected.numpy().tobytes()


def test_a_slot_may_change_hands_while_its_block_is_on_the_way() -> None:
    device = LateDevice()
    pool = pool_on(device)
    blocks = [random_payload(LAYOUT.block_nbytes, seed) for seed in range(3)]
    for slot, block in enumerate(blocks):
        pool.write_block(slot, block)
    reads = [pool.begin_read([0, 2]), pool.begin_read([1])]
    assert not any(read.done() for read in reads)
    for slot in range(3):
        pool.write_block(slot, random_payload(LAYOUT.block_nbytes, 9))
    assert [copy.tobytes() for read in reads for copy in read.take()] == [blocks[0], blocks[2], blocks[1]]
    assert all(read.done() for read in reads)


def test_more_blocks_enter_than_there_are_buffers(device: Device) -> None:
    pool = pool_on(device, n_slots=3 * RING_BUFFERS)
    blocks = [random_payload(LAYOUT.block_nbytes, seed) for seed in range(3 * RING_BUFFERS)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(pool.write_block, range(len(blocks)), blocks))
    assert [pool.read_block(slot).tobytes() for slot in range(len(blocks))] == blocks


@pytest.mark.parametrize("nbytes", [0, LAYOUT.block_nbytes - 1, LAYOUT.block_nbytes + 1])
def test_a_payload_of_another_size_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"must have {LAYOUT.block_nbytes} bytes"):
        pool_on(HostDevice()).write_block(0, random_payload(nbytes))


async def test_an_edge_shards_tier_reads_and_writes_whole_frames(device: Device) -> None:
    """Through threads, as it does with blocks too large for the event loop."""
    pool, slots = pool_on(device), PoolSlots(12)
    tier = DeviceTier(pool, slots)
    chain = chain_of(3)
    key = chain.keys[1]
    meta = BlockMeta(
        namespace=NAMESPACE,
        key=key,
        parent=chain.parent(1),
        chain_index=1,
        placement=chain.placement(1),
        epoch=EPOCH,
        quality=Quality.LOSSLESS,
        fingerprint=LAYOUT.fingerprint,
    )
    (slot,) = slots.allocate(1, "sequence")
    pool.write_block(slot, payload_of(key))
    tier.keep(Place(0, 1), slot, meta)
    frames = await asyncio.gather(*(asyncio.to_thread(tier._frame, slot, meta) for _ in range(4)))
    read = await tier.read(Place(0, 1))
    assert read is not None
    for frame in (*frames, read):
        assert bytes(decode_frame(frame)[1]) == payload_of(key).tobytes()
    other = pool_on(device)
    arriving = DeviceTier(other, PoolSlots(12))
    assert arriving.set_aside(1) == 1
    await arriving.write(Place(7, 1), read)
    (there,) = arriving.lend([Place(7, 1)])
    assert other.read_block(there).tobytes() == payload_of(key).tobytes()
