"""A reader of the arena gets what its reference means or a miss with a reason: never other data."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np
import pytest

from kvstore.answers import BlockMiss, VerifiedBlock
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import BlockRef, Incarnation, MissReason
from kvstore.tiers import slot_table
from kvstore.tiers.arena import Geometry
from kvstore.tiers.base import place_of
from kvstore.transport import landing
from kvstore.transport.landing import Landing
from kvstore.transport.shm import reader as reader_module
from kvstore.transport.shm.reader import ArenaReader
from tests.kvstore.oracle import FRAME_NBYTES, LAYOUT, TIMEOUT
from tests.kvstore.transport.shm.conftest import Near


async def test_blocks_are_read_without_asking_the_shard(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(near.served.server._service.blocks, "_shard")  # it could not answer
    buffers = near.buffers()
    got = await near.session.read_into(near.blocks, buffers, timeout_s=TIMEOUT)
    assert [item.index for item in got if isinstance(item, VerifiedBlock)] == [0, 1, 2, 3]
    assert [bytes(buffer) for buffer in buffers] == [near.expected(i) for i in range(4)]
    streamed = [item async for item in near.session.read(near.blocks, timeout_s=TIMEOUT)]
    assert [bytes(b.payload) for b in streamed if isinstance(b, VerifiedBlock)] == [
        near.expected(i) for i in range(4)
    ]
    assert near.client.counters["shm:read_blocks"] == 4


async def test_a_past_generation_is_a_stale_reference(near: Near) -> None:
    ref = near.blocks[1].ref
    near.blocks[1] = near.blocks[1]._replace(ref=ref._replace(generation=ref.generation + 1))
    near.arena.discard(place_of(near.blocks[2].ref))
    got = await near.session.read_into(near.blocks, near.buffers(), timeout_s=TIMEOUT)
    assert [item.reason if isinstance(item, BlockMiss) else None for item in got] == [
        None,
        MissReason.STALE_REFERENCE,
        MissReason.STALE_REFERENCE,
        None,
    ]
    streamed = [item async for item in near.session.read(near.blocks[1:3], timeout_s=TIMEOUT)]
    assert {item.reason for item in streamed if isinstance(item, BlockMiss)} == {MissReason.STALE_REFERENCE}
    near.arena.write = None  # type: ignore[assignment,method-assign]  # the shard lost a frame: no integrity left
    near.served.driver.check_integrity = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("moment", ["before the copy", "after the copy"])
async def test_a_slot_reused_during_a_copy_is_never_other_data(
    near: Near, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory goes to another block while we copy. Only the second look at the generation tells a past
    reference from a corrupt block, and a late copy of the right bytes from one that is still theirs."""
    slot, generation = near.blocks[0].ref.slot, near.blocks[0].ref.generation
    other = bytes(near.arena._frames[near.blocks[3].ref.slot].frame)
    rows = near.arena._rows

    def reuse() -> None:
        slot_table.withdraw(rows, slot)
        near.arena._frames[slot].frame[:] = other
        slot_table.publish(rows, slot, generation + 1, near.arena._frames[slot].offset, FRAME_NBYTES)

    def copy_slowly(target: memoryview, source: memoryview) -> int:
        if moment == "before the copy" and rows[slot, 0] == generation:
            reuse()
        digest = landing.copy_and_hash(target, source)
        if moment == "after the copy" and rows[slot, 0] == generation:
            reuse()
        return digest

    monkeypatch.setattr(reader_module, "copy_and_hash", copy_slowly)
    got = await near.session.read_into(near.blocks[:1], near.buffers()[:1], timeout_s=TIMEOUT)
    assert got == [BlockMiss(0, near.made.keys[0], MissReason.STALE_REFERENCE)]


@pytest.mark.parametrize("how", ["into", "stream"])
async def test_a_corrupt_byte_is_refused_and_reported(near: Near, how: str) -> None:
    ref = near.blocks[2].ref
    assert near.arena.flip_byte(place_of(ref), HEADER_NBYTES + 5)
    if how == "into":
        got = await near.session.read_into(near.blocks, near.buffers(), timeout_s=TIMEOUT)
    else:
        got = [item async for item in near.session.read(near.blocks, timeout_s=TIMEOUT)]
    assert got[2] == BlockMiss(2, near.made.keys[2], MissReason.CHECKSUM)
    assert sum(isinstance(item, VerifiedBlock) for item in got) == 3
    await near.client._peers.finish_errands()
    again = await near.session.match(near.made.keys, owner="r", lease_s=1.0, timeout_s=TIMEOUT)
    assert len(again.blocks) == 2, "the shard was not told, or did not look"


@pytest.mark.parametrize("row", [(8192 + 1, 300), (1 << 62, 300), (8192, 1 << 62), (8192, 10)], ids=str)
async def test_a_row_that_points_elsewhere_is_not_believed(near: Near, row: tuple[int, int]) -> None:
    slot, generation = near.blocks[0].ref.slot, near.blocks[0].ref.generation
    slot_table.publish(near.arena._rows, slot, generation, *row)
    buffers = near.buffers()
    got = await near.session.read_into(near.blocks, buffers, timeout_s=TIMEOUT)
    assert isinstance(got[0], VerifiedBlock)
    assert near.client.counters["shm:asked_shard"] == 1, "only the shard knows where it is"
    assert bytes(buffers[0]) == near.expected(0)


async def test_frames_outside_the_arena_come_over_grpc(near: Near) -> None:
    for block in near.blocks:
        stored = near.arena._frames[block.ref.slot]
        slot_table.publish(near.arena._rows, block.ref.slot, stored.generation, 0, FRAME_NBYTES)
    buffers = near.buffers()
    got = await near.session.read_into(near.blocks, buffers, timeout_s=TIMEOUT)
    assert all(isinstance(item, VerifiedBlock) for item in got)
    assert [bytes(buffer) for buffer in buffers] == [near.expected(i) for i in range(4)]


async def test_references_of_other_lives_and_tables_are_the_shards_to_judge(near: Near) -> None:
    reader = near.transport._reader
    assert reader is not None
    ref = near.blocks[0].ref
    strange = [
        ref._replace(incarnation=Incarnation(ref.incarnation ^ 1)),
        ref._replace(slot=near.arena.geometry.slots),
        ref._replace(slot=(1 << 64) - 1, generation=(1 << 64) - 1),
    ]
    target = Landing([memoryview(bytearray(LAYOUT.block_nbytes)) for _ in strange])
    assert reader.read_into(strange, target, range(3)) == [0, 1, 2]
    assert [reader.read(one) for one in strange] == [None, None, None]
    zero = BlockRef(ref.shard, ref.incarnation, 63, 0)
    assert reader.read(zero) is MissReason.STALE_REFERENCE, "a slot that was never used is of generation 0"


async def test_a_payload_of_another_size_is_another_layout(near: Near) -> None:
    layout = dataclasses.replace(LAYOUT, layers=4)
    near.session._spec = dataclasses.replace(near.session._spec, layout=layout)
    buffers = [np.zeros(layout.block_nbytes, dtype=np.uint8) for _ in near.blocks]
    got = await near.session.read_into(near.blocks, buffers, timeout_s=TIMEOUT)
    assert {item.reason for item in got if isinstance(item, BlockMiss)} == {MissReason.OTHER_LAYOUT}
    assert len(got) == 4


@pytest.mark.parametrize("buffer", [bytearray(3), bytes(LAYOUT.block_nbytes)], ids=["small", "read-only"])
async def test_a_buffer_that_does_not_fit_is_the_callers_mistake(near: Near, buffer: bytes) -> None:
    with pytest.raises(ValueError, match="give a writable one"):
        await near.session.read_into(near.blocks[:1], [buffer], timeout_s=TIMEOUT)
    with pytest.raises(ValueError, match="one each"):
        await near.session.read_into(near.blocks, [], timeout_s=TIMEOUT)


@pytest.mark.parametrize("geometry", [(4096, 1 << 20), (1 << 30, 1), (5000, 1)], ids=str)
def test_a_geometry_that_does_not_fit_the_memory_is_refused(geometry: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="an arena of"):
        ArenaReader(mmap.mmap(-1, 8192), Geometry(*geometry), Incarnation(1))
