"""Promise: what moves between tiers arrives whole or not at all, and whoever reads meanwhile reads right."""

from __future__ import annotations

import asyncio
import errno
import itertools

import pytest

from kvstore import failpoints
from kvstore.core.moves import STEPS_A_CALL
from kvstore.core.state import DemoteWhen
from kvstore.core.versions import ON_HOST, ON_NVME
from kvstore.errors import Unavailable
from kvstore.frame import decode_frame
from kvstore.mover import RETRY_S
from kvstore.nouns import DROP, KVLayout, MissReason, Quality, Snapshot, Tier
from kvstore.transport.base import Purge
from tests.kvstore.durable import E1, ENCODED_NBYTES, Tiered, encode, wanted
from tests.kvstore.oracle import FRAME_NBYTES, SPEC, TIMEOUT, chain, get, payload, put, refs_in

FOUR = [0, 1, 2, 3]


async def test_blocks_go_down_and_are_read_from_there() -> None:
    shard = await Tiered().open()
    await shard.put(FOUR)
    assert shard.below.nbytes() == 4 * FRAME_NBYTES
    await shard.leave_host()
    assert shard.host.nbytes() == 0
    assert await shard.seen() == wanted(FOUR, shard.keys)
    await shard.move()
    assert shard.on() == dict.fromkeys(FOUR, Tier.HOST)
    assert await shard.seen() == wanted(FOUR, shard.keys)
    shard.all_is_well()


async def test_an_encoded_block_is_what_the_codec_made_of_it() -> None:
    shard = await Tiered(encode=encode).open()
    await shard.put([0])
    await shard.leave_host()
    assert await shard.seen() == []
    assert await shard.seen(least=Quality.INT8) == [payload(shard.keys.keys[0], E1, Quality.INT8)[:32]]
    assert shard.below.nbytes() == ENCODED_NBYTES
    shard.all_is_well()


async def test_what_no_codec_takes_stays_and_is_not_asked_for_again() -> None:
    asked = 0

    def none(_frame: memoryview, _layout: KVLayout) -> None:
        nonlocal asked
        asked += 1

    shard = await Tiered(encode=none).open()
    await shard.put([0])
    for _ in range(3):
        await shard.seen()
        await shard.move()
    assert asked == shard.driver.core.counters["not_encodable"] == 1
    assert await shard.seen() == wanted([0], shard.keys)
    shard.all_is_well()


async def test_a_codec_that_does_not_keep_to_its_size_loses_nothing() -> None:
    shard = await Tiered(encode=lambda frame, layout: memoryview(bytearray(7))).open()
    await shard.put([0])
    assert shard.below.nbytes() == 0
    assert await shard.seen() == wanted([0], shard.keys)
    shard.all_is_well()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.NVME])
async def test_a_corrupt_frame_is_retired_and_never_carried_on(tier: Tier) -> None:
    shard = await Tiered().open()
    await put(shard.driver, shard.keys, FOUR, E1)
    if tier is Tier.NVME:
        await shard.move()
        await shard.leave_host()
        await shard.seen()
    broken = shard.below if tier is Tier.NVME else shard.host
    assert broken.flip_byte(shard.place(1), FRAME_NBYTES - 1)
    await shard.move()
    assert shard.driver.core.counters["moves_of_broken"] == 1
    assert sorted(shard.on()) == [0, 2, 3]
    assert await shard.seen() == wanted([0], shard.keys)
    await shard.put([1])  # and so it can be written again
    assert await shard.seen() == wanted(FOUR, shard.keys)
    shard.all_is_well()


async def test_a_frame_of_another_block_is_not_carried_on_either() -> None:
    shard = await Tiered().open()
    await put(shard.driver, shard.keys, [0, 1], E1)
    one, two = shard.place(0), shard.place(1)
    frames = shard.host._frames
    frames[one.slot], frames[two.slot] = frames[two.slot], frames[one.slot]
    await shard.move()
    assert shard.on() == {}
    shard.all_is_well()


async def test_a_reader_can_have_a_misplaced_frame_retired() -> None:
    shard = await Tiered().open()
    await shard.put([0, 1])
    one, two = shard.place(0), shard.place(1)
    frames = shard.host._frames
    frames[one.slot] = frames[two.slot]
    row = shard.row(0)
    assert await shard.driver.report(shard.namespace, [row.ref], timeout_s=TIMEOUT) == 1


async def test_a_disk_that_cannot_be_read_costs_a_miss_and_a_counter() -> None:
    shard = await Tiered().open()
    await shard.put([0])
    await shard.leave_host()
    shard.disk.failures["read"] = 1
    assert await shard.seen() == [MissReason.SHARD_UNAVAILABLE]
    assert shard.driver.core.counters["storage_error:read"] == 1
    shard.disk.failures["read"] = 1
    await shard.move()
    assert shard.driver.core.counters[f"host_failed:{errno.EIO}"] == 1
    assert shard.on() == {0: Tier.NVME}
    assert await shard.seen() == wanted([0], shard.keys)
    await shard.move()
    assert shard.on() == {0: Tier.HOST}
    shard.all_is_well()


@pytest.mark.parametrize("what", ["sync", "write"])
async def test_a_disk_that_fails_loses_its_batch_alone_and_is_asked_again_later(what: str) -> None:
    shard = await Tiered().open()
    await shard.put([0])
    shard.disk.failures[what] = 1
    await shard.put([1, 2])
    assert shard.driver.core.counters[f"nvme_failed:{errno.EIO}"] == 1
    assert shard.below.nbytes() == FRAME_NBYTES
    shard.all_is_well()
    await shard.seen()
    await shard.move()
    assert shard.below.nbytes() == FRAME_NBYTES  # not yet
    shard.clock.advance(RETRY_S)
    await shard.move()
    assert shard.below.nbytes() == 3 * FRAME_NBYTES
    await shard.restart()
    assert await shard.seen() == wanted([0, 1, 2], shard.keys)


async def test_the_mover_goes_on_by_itself_after_a_pause() -> None:
    """Nobody speaks to the shard meanwhile: its tick is enough."""
    shard = await Tiered().open()
    await put(shard.driver, shard.keys, [0], E1)
    shard.disk.failures["sync"] = 1
    shard.mover.start()
    await _turns(20)
    await put(shard.driver, shard.keys, [1], E1)
    await _turns(20)
    assert shard.below.nbytes() == 0
    shard.clock.advance(RETRY_S)
    await shard.driver.tick()
    await _turns(20)
    assert shard.below.nbytes() == FRAME_NBYTES  # the one that was let go of since
    await shard.driver.close()


async def test_a_mover_that_can_do_nothing_does_not_hold_up_the_loop() -> None:
    shard = await Tiered(host_frames=4, when=DemoteWhen.CROWDED, watermarks=(0.5, 0.2)).open()
    shard.mover.start()
    held = await put(shard.driver, shard.keys, FOUR, E1, pin_for_s=10.0)
    assert shard.driver.core.moves.any_wanted()
    await asyncio.wait_for(_turns(50), 5.0)
    assert shard.below.nbytes() == 0
    assert held.lease is not None
    await shard.driver.release([held.lease], timeout_s=TIMEOUT)
    await _turns(100)
    assert shard.host.nbytes() < 4 * FRAME_NBYTES
    await shard.driver.close()
    shard.all_is_well()


async def test_a_host_that_is_emptied_holds_up_nobody() -> None:
    """Nothing may go below, so much is given up: others have their turns between slices of it."""
    blocks = 4 * STEPS_A_CALL
    shard = await Tiered(host_frames=blocks, when=DemoteWhen.CROWDED, watermarks=(0.9, 0.2)).open()
    shard.keys = chain(shard.namespace, blocks)
    for first in range(0, blocks, 32):
        await put(shard.driver, shard.keys, list(range(first, first + 32)), E1)
    shard.driver.core.moves._admission = _Nothing()
    left = [len(shard.driver.core.index)]
    moving = asyncio.create_task(shard.move())
    while not moving.done():
        await asyncio.sleep(0)
        left.append(len(shard.driver.core.index))
    assert left[-1] <= blocks * 0.2
    assert max(before - after for before, after in itertools.pairwise(left)) <= STEPS_A_CALL
    assert shard.below.nbytes() == 0
    shard.all_is_well()


class _Nothing:
    def admits(self, slot: int, now: float) -> bool:
        return False


async def test_a_purge_meets_a_move_at_every_turn_of_the_loop() -> None:
    for turns in range(12):
        for lossy in (None, encode):
            shard = await Tiered(encode=lossy).open()
            await put(shard.driver, shard.keys, [0], E1)
            moving = asyncio.create_task(shard.move())
            await _turns(turns)
            await shard.driver.purge(Purge(shard.namespace, (shard.keys.keys[0],), None), timeout_s=TIMEOUT)
            await moving
            assert await shard.seen(least=Quality.INT4) == []
            assert shard.below.nbytes() == shard.host.nbytes() == 0
            shard.all_is_well()
            await shard.restart()
            assert await shard.seen(least=Quality.INT4) == []


async def test_a_mover_that_is_stopped_at_any_turn_leaves_nothing_under_way() -> None:
    for turns in range(12):
        shard = await Tiered(encode=encode).open()
        await put(shard.driver, shard.keys, FOUR, E1)
        shard.mover.start()
        await _turns(turns)
        await shard.mover.stop()
        shard.all_is_well()
        assert await shard.seen() == wanted(FOUR, shard.keys)


async def test_a_read_that_races_with_promote_and_leave_is_never_lost() -> None:
    """The block leaves the tier the reader looks at, at every turn of its look."""
    for turns in range(10):
        shard = await Tiered(exclusive=True).open()
        await shard.put([0])
        assert shard.on() == {0: Tier.NVME}
        matched = await shard.driver.match(_snapshot(shard), shard.keys.keys, "r", 10.0, timeout_s=TIMEOUT)
        refs = refs_in(matched)
        assert matched.lease is not None
        reading = asyncio.create_task(get(shard.driver, shard.namespace, refs))
        await _turns(turns)
        await shard.move()  # up
        await shard.driver.release([matched.lease], timeout_s=TIMEOUT)
        await shard.move()  # and down again, nobody holds it
        assert await reading == wanted([0], shard.keys)
        assert shard.driver.core.counters["retired_corrupt"] == 0
        shard.all_is_well()


async def test_bytes_that_are_really_lost_are_told_as_lost() -> None:
    shard = await Tiered().open()
    await shard.put([0])
    await shard.leave_host()
    shard.below.discard(shard.place(0))
    assert await shard.seen() == [MissReason.ABSENT]
    assert shard.on() == {}


async def test_a_waiter_for_a_promotion_is_told_when_it_is_there() -> None:
    shard = await Tiered().open()
    await shard.put([0])
    await shard.leave_host()
    await shard.seen()
    ref = shard.row(0).ref
    waiting = asyncio.create_task(shard.mover.wait_for([ref], 5.0))
    await _turns(3)
    assert not waiting.done()
    await shard.move()
    await _turns(3)
    assert waiting.done()
    assert shard.driver.core.index.versions.residences[ref.slot] == ON_HOST | ON_NVME


async def test_a_host_that_refuses_a_promoted_frame_costs_the_promotion() -> None:
    shard = await Tiered().open()
    await shard.put([0])
    await shard.leave_host()
    await shard.seen()
    with failpoints.armed("storage.write", failpoints.Fail(OSError(errno.ENOMEM, "no memory"))):
        await shard.move()
    assert shard.on() == {0: Tier.NVME}
    shard.all_is_well()


async def test_what_is_dropped_while_it_moves_does_not_land() -> None:
    shard = await Tiered(encode=encode).open()
    await put(shard.driver, shard.keys, FOUR, E1)
    moving = asyncio.create_task(shard.move())
    await _turns(2)
    await shard.driver.advance_epoch(SPEC.model_id, 2, DROP, timeout_s=TIMEOUT)
    await moving
    await shard.driver.tick()
    assert len(shard.driver.core.index) == 0
    shard.all_is_well()


async def test_a_note_that_cannot_be_kept_is_an_error_that_says_so() -> None:
    shard = await Tiered().open()
    shard.disk.failures["note"] = 1
    with pytest.raises(Unavailable, match="durable"):
        await shard.driver.purge(Purge(shard.namespace, None, None), timeout_s=TIMEOUT)
    await shard.driver.purge(Purge(shard.namespace, None, None), timeout_s=TIMEOUT)


async def test_the_frame_below_is_the_same_bytes() -> None:
    shard = await Tiered().open()
    await shard.put([0])
    place = shard.place(0)
    above, below = await shard.host.read(place), await shard.below.read(place)
    assert above is not None
    assert below is not None
    assert bytes(above) == bytes(below)
    assert decode_frame(below)[0].meta == shard.row(0).meta(SPEC.layout.fingerprint)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _snapshot(shard: Tiered) -> Snapshot:
    return Snapshot(shard.namespace, E1)
