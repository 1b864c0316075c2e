"""Promise 4 in small: what was synced is there after a restart, what was purged is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, CorruptBlock
from kvstore.nouns import DROP, ISOLATE, KVLayout, Tier
from kvstore.tiers.base import Place
from kvstore.tiers.durable import AdvanceNote, DurableTier, EpochNote, NamespaceNote, PurgeNote
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, epoch_of, key_of, namespace_of, verified

LAYOUT = KVLayout(1, 0, 1, 16, "float32")


def config(*directories: Path, **settings: object) -> NvmeConfig:
    given = {"disk_nbytes": len(directories) * (16 << 18), "segment_nbytes": 1 << 18, **settings}
    return NvmeConfig(directories, **given)  # type: ignore[arg-type]


async def opened(settings: NvmeConfig) -> NvmeTier:
    """A tier that has adopted what it recovered: a block's slot is its key, its generation 1."""
    tier = NvmeTier(settings)
    for block in (await tier.recover()).blocks:
        tier.adopt(block.record, Place(int.from_bytes(block.frame.meta.key, "little"), 1))
    return tier


async def write(tier: DurableTier, *blocks: Block, generation: int = 1) -> None:
    for block in blocks:
        await tier.write(Place(block.key, generation), block.frame())


async def held(tier: DurableTier, *keys: int, generation: int = 1) -> list[Block | None]:
    frames = [await tier.read(Place(key, generation)) for key in keys]
    return [None if frame is None else verified(frame) for frame in frames]


async def test_a_frame_is_read_back_queued_written_and_after_a_restart(tmp_path: Path) -> None:
    blocks = [Block(0), Block(1, nbytes=1), Block(2, nbytes=100_000), Block(3, nbytes=0)]
    tier = await opened(config(tmp_path))
    assert tier.tier is Tier.NVME
    await write(tier, *blocks)
    assert await held(tier, 0, 1, 2, 3, 4) == [*blocks, None]
    await tier.sync()
    assert await held(tier, 0, 1, 2, 3, 4) == [*blocks, None]
    assert tier.nbytes() == sum(block.frame().nbytes for block in blocks)
    await tier.close()
    tier = await opened(config(tmp_path))
    assert await held(tier, 0, 1, 2, 3, 4) == [*blocks, None]
    assert tier.nbytes() == sum(block.frame().nbytes for block in blocks)
    await tier.close()


async def test_generations_keep_slots_apart(tmp_path: Path) -> None:
    tier = await opened(config(tmp_path))
    for synced in (False, True):
        await tier.write(Place(7, 2), Block(2).frame())
        await tier.write(Place(7, 1), Block(1).frame())  # late
        if synced:
            await tier.sync()
        assert await held(tier, 7, generation=1) == [None]
        assert await held(tier, 7, generation=2) == [Block(2)]
        tier.discard(Place(7, 1))
        assert await held(tier, 7, generation=2) == [Block(2)]
        tier.discard(Place(7, 2))
        tier.discard(Place(7, 2))
        assert await held(tier, 7, generation=2) == [None]
        assert tier.nbytes() == 0
    await tier.write(Place(7, 3), Block(3).frame())
    await tier.sync()
    await tier.write(Place(7, 4), Block(4).frame())
    assert await held(tier, 7, generation=3) == [None]
    assert await held(tier, 7, generation=4) == [Block(4)]
    assert tier.nbytes() == Block(4).frame().nbytes
    await tier.close()


async def test_a_frame_in_its_own_room_is_written_without_a_copy(tmp_path: Path) -> None:
    tier = await opened(config(tmp_path))
    frame = Block(1).frame()
    room = tier.allocate(frame.nbytes)
    room[:] = frame
    await tier.write(Place(1, 1), room)
    borrowed = await tier.borrow(Place(1, 1))
    assert borrowed is not None
    room[300] ^= 1  # nobody may do that: it shows that the bytes are the same
    assert borrowed[300] == room[300]
    tier.give_back(borrowed)
    room[300] ^= 1
    await tier.sync()
    assert await held(tier, 1) == [Block(1)]
    tier.give_up(tier.allocate(10))
    await tier.close()


async def test_notes_come_back_in_order_and_purges_are_applied(tmp_path: Path) -> None:
    tier = await opened(config(tmp_path))
    namespace = NamespaceNote(namespace_of(0), "m", "tenant", LAYOUT)
    first, second = EpochNote("m", epoch_of(1)), EpochNote("m", epoch_of(2))
    for note in (
        namespace,
        first,
        AdvanceNote("m", 1, DROP),
        second,
        AdvanceNote("m", 2, ISOLATE),
        namespace,
    ):
        await tier.note(note)
    old = [Block(i) for i in range(4)] + [Block(i, epoch=2) for i in range(4, 8)] + [Block(8, namespace=1)]
    await write(tier, *old)
    await tier.sync()
    await tier.note(PurgeNote(namespace_of(0), (key_of(0), key_of(99)), None))
    await tier.note(PurgeNote(namespace_of(0), None, 2))
    await tier.note(PurgeNote(namespace_of(2), None, None))
    await write(tier, Block(0), Block(5, epoch=2), generation=2)
    await tier.sync()
    await tier.close()
    for _ in range(2):
        tier = NvmeTier(config(tmp_path))
        found = await tier.recover()
        assert list(found.notes) == [
            namespace,
            first,
            AdvanceNote("m", 1, DROP),
            second,
            AdvanceNote("m", 2, ISOLATE),
        ]
        assert [int.from_bytes(b.frame.meta.key, "little") for b in found.blocks] == [1, 2, 3, 8, 0, 5]
        assert found.counters["purged"] >= 3
        await tier.close()


async def test_what_is_not_adopted_is_dead_after_the_first_write(tmp_path: Path) -> None:
    tier = await opened(config(tmp_path))
    await write(tier, Block(1), Block(2))
    await tier.sync()
    await tier.close()
    tier = NvmeTier(config(tmp_path))
    found = await tier.recover()
    tier.adopt(found.blocks[0].record, Place(1, 1))
    await write(tier, Block(3))
    assert await held(tier, 1, 2, 3) == [Block(1), None, Block(3)]
    with pytest.raises(AssertionError):
        tier.adopt(found.blocks[1].record, Place(2, 1))
    await tier.close()


async def test_several_directories_share_the_work(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("a", "b", "c")]
    tier = await opened(config(*directories, batch_nbytes=1 << 14))
    blocks = [Block(i, nbytes=20_000) for i in range(60)]
    await write(tier, *blocks)
    await tier.sync()
    await tier.close()
    assert all(len(list(path.glob("segment-*"))) >= 1 for path in directories)
    assert {oct(path.stat().st_mode & 0o777) for path in directories} == {"0o700"}
    files = [file for path in directories for file in path.iterdir()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}
    tier = await opened(config(*reversed(directories)))
    assert await held(tier, *range(60)) == blocks
    await tier.close()


async def test_one_process_at_a_time(tmp_path: Path) -> None:
    tier = await opened(config(tmp_path))
    other = NvmeTier(config(tmp_path))
    with pytest.raises(ConfigError, match="in use"):
        await other.recover()
    await other.close()
    await tier.close()
    tier = await opened(config(tmp_path))
    await tier.close()


async def test_what_no_segment_can_hold_is_refused(tmp_path: Path) -> None:
    tier = await opened(config(tmp_path))
    with pytest.raises(OSError, match="fits no segment"):
        await write(tier, Block(1, nbytes=1 << 18))
    with pytest.raises(CorruptBlock):
        await tier.write(Place(1, 1), memoryview(bytearray(5000)))
    await tier.sync()
    assert tier.nbytes() == 0
    await tier.close()
    with pytest.raises(OSError, match="closed"):
        await write(tier, Block(1))


async def test_writes_that_never_queue_up_fill_all_disks_alike(tmp_path: Path) -> None:
    """So that no disk is full while another has room, and all that `room_nbytes` tells can be written."""
    directories = [tmp_path / name for name in ("a", "b")]
    settings = config(*directories, disk_nbytes=2 * (8 << 18), batch_nbytes=1 << 14, write_wait_s=1.0)
    tier = await opened(settings)
    count = 0
    while tier.nbytes() + Block(count, nbytes=30_000).frame().nbytes < 0.95 * tier.room_nbytes():
        await write(tier, Block(count, nbytes=30_000))
        await tier.sync()  # nothing waits in any queue when the next one comes
        count += 1
    assert count > 30
    on_each = [sum(file.stat().st_size for file in path.glob("segment-*")) for path in directories]
    assert max(on_each) - min(on_each) <= 2 * settings.segment_nbytes
    await tier.close()


async def test_directories_become_the_first_named_shards_own(tmp_path: Path) -> None:
    for key, owner in enumerate(["", "shard-0", "", "shard-0"]):
        tier = NvmeTier(replace(config(tmp_path), owner=owner))
        assert len((await tier.recover()).blocks) == key, "nobody's blocks are taken over"
        for record in range(key):
            tier.adopt(record, Place(record, 1))
        await write(tier, Block(key))
        await tier.sync()
        await tier.close()
    with pytest.raises(ConfigError, match="holds the blocks of shard-0, this is shard-1"):
        await NvmeTier(replace(config(tmp_path), owner="shard-1")).recover()
