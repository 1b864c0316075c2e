"""A frame that the shard moves under a reader's hands is read all the same: not lost, not taken for corrupt.

Readers are on a second, read-only map of the arena. What the shard does between their steps is done there by
the test, by the very methods that compaction uses.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from kvstore.answers import BlockMiss, VerifiedBlock
from kvstore.nouns import MissReason
from kvstore.tiers.arena import ArenaTier, Stored
from kvstore.tiers.base import Place
from kvstore.tiers.extents import PAGE_NBYTES
from kvstore.tiers.slot_table import CHECK, GENERATION
from kvstore.transport import landing
from kvstore.transport.shm import reader as reader_module
from tests.kvstore.oracle import TIMEOUT
from tests.kvstore.transport.shm import hammer
from tests.kvstore.transport.shm.conftest import Near

MOMENTS = ["before the copy", "after the copy"]


def at_once(work: Coroutine[Any, Any, object]) -> None:
    """Frames as small as ours are copied without waiting."""
    with pytest.raises(StopIteration):
        work.send(None)


class Mover:
    """Moves one block's frame, and puts another frame where it was."""

    def __init__(self, near: Near) -> None:
        self.near = near
        self.slot = near.blocks[0].ref.slot
        self.other = bytes(near.arena._frames[near.blocks[3].ref.slot].frame)

    @property
    def stored(self) -> Stored:
        return self.near.arena._frames[self.slot]

    def away(self) -> memoryview:
        """The room it left, with another frame in it."""
        arena, left = self.near.arena, self.stored
        at_once(arena._relocate(self.slot, left, arena.allocate(left.frame.nbytes)))
        room = arena.allocate(left.frame.nbytes)
        assert arena._offset_of(room) == left.offset, "its place was to be used again at once"
        room[:] = self.other
        return room

    def back(self, room: memoryview) -> None:
        arena = self.near.arena
        arena.give_up(room)
        at_once(arena._relocate(self.slot, self.stored, arena.allocate(room.nbytes)))


class Hooked:
    """`act(look)` before or after the bytes of each look are copied."""

    def __init__(self, moment: str, act: Callable[[int], object], monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self._moment, self._act = moment, act
        for name in ("copy_and_hash", "copy"):
            monkeypatch.setattr(reader_module, name, self._hooked(getattr(landing, name)))

    def _hooked(self, copies: Callable[..., Any]) -> Callable[..., Any]:
        def copy(target: memoryview, source: memoryview) -> Any:
            self.looks += 1
            if self._moment == "before the copy":
                self._act(self.looks)
            done = copies(target, source)
            if self._moment == "after the copy":
                self._act(self.looks)
            return done

        return copy


async def read(near: Near, how: str) -> bytes | MissReason:
    """The first block, by one of the two ways there are."""
    if how == "into":
        buffers = near.buffers()[:1]
        (got,) = await near.session.read_into(near.blocks[:1], buffers, timeout_s=TIMEOUT)
        return got.reason if isinstance(got, BlockMiss) else bytes(buffers[0])
    (item,) = [item async for item in near.session.read(near.blocks[:1], timeout_s=TIMEOUT)]
    return bytes(item.payload) if isinstance(item, VerifiedBlock) else item.reason


@pytest.fixture(autouse=True)
def nothing_is_reported(near: Near) -> Any:
    yield
    assert not any("CHECKSUM" in str(name).upper() for name in near.client.counters), near.client.counters


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["into", "stream"])
async def test_a_frame_that_moved_once_is_read_at_its_new_place(
    near: Near, how: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = Mover(near)

    def once(look: int) -> None:
        if look == 1:
            mover.away()

    hooked = Hooked(moment, once, monkeypatch)
    assert await read(near, how) == near.expected(0)
    assert hooked.looks == 2
    assert not near.client.counters["shm:asked_shard"]


@pytest.mark.parametrize("how", ["into", "stream"])
async def test_a_frame_that_moves_at_every_look_is_left_to_the_shard(
    near: Near, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = Mover(near)
    hooked = Hooked("before the copy", lambda _: mover.away(), monkeypatch)
    assert await read(near, how) == near.expected(0)
    assert hooked.looks == 2
    assert near.client.counters["shm:asked_shard"] == 1


@pytest.mark.parametrize("how", ["into", "stream"])
async def test_a_frame_that_was_away_and_is_back_is_not_what_was_copied(
    near: Near, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A-B-A: generation, offset and size are what they were; the bytes that were copied are another's."""
    mover = Mover(near)
    places: list[int] = []

    def copied(target: memoryview, source: memoryview) -> Any:
        if not places:
            places.append(mover.stored.offset)
            room = mover.away()
            done = landing.copy_and_hash(target, source)
            mover.back(room)
            places.append(mover.stored.offset)
            return done
        places.append(mover.stored.offset)
        return landing.copy_and_hash(target, source)

    monkeypatch.setattr(reader_module, "copy_and_hash", copied)
    monkeypatch.setattr(reader_module, "copy", copied)
    assert await read(near, how) == near.expected(0)
    assert len(places) == 3, "it was not copied again"
    assert len(set(places)) == 1, "it is not back where it was"


@pytest.mark.parametrize("how", ["into", "stream"])
async def test_a_frame_seen_in_the_middle_of_its_move_is_left_to_the_shard(near: Near, how: str) -> None:
    near.arena._rows[near.blocks[0].ref.slot, CHECK] ^= 1  # the shard was stopped there
    assert await read(near, how) == near.expected(0)
    assert near.client.counters["shm:asked_shard"] == 1


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["into", "stream"])
async def test_a_frame_that_moved_and_was_discarded_is_a_stale_reference(
    near: Near, how: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = Mover(near)

    def act(look: int) -> None:
        mover.away()
        if look == 2:
            near.arena.discard(Place(mover.slot, near.blocks[0].ref.generation))

    Hooked(moment, act, monkeypatch)
    assert await read(near, how) is MissReason.STALE_REFERENCE
    near.served.driver.check_integrity = lambda: None  # type: ignore[method-assign]  # the shard lost a frame


async def test_a_frame_that_was_brought_in_is_read_without_asking(near: Near) -> None:
    mover = Mover(near)
    stored, arena = mover.stored, near.arena
    frame = memoryview(bytearray(stored.frame))
    arena.discard_slot(mover.slot)
    runs = sorted(arena._free.free_runs(), key=lambda run: -run[1])
    rooms = [arena.allocate(pages * PAGE_NBYTES) for _, pages in runs]  # nothing is left
    await arena.write(Place(mover.slot, stored.generation), frame)
    assert await read(near, "into") == near.expected(0)
    assert near.client.counters["shm:asked_shard"] == 1
    for room in rooms:
        arena.give_up(room)
    await near.served.driver.tick()
    assert arena.counters["arena:brought_in"] == 1, "the shard's upkeep did not see to it"
    assert await read(near, "into") == near.expected(0)
    assert near.client.counters["shm:asked_shard"] == 1


async def test_a_frame_is_at_no_moment_out_of_sight_while_it_moves(near: Near) -> None:
    mover, table = Mover(near), near.arena._rows
    generations: list[int] = []

    class Watched(np.ndarray):
        def __setitem__(self, at: Any, value: Any) -> None:
            super().__setitem__(at, value)
            generations.append(int(table[mover.slot, GENERATION]))

    near.arena._rows = table.view(Watched)
    mover.away()
    near.arena._rows = table
    assert generations
    assert set(generations) == {near.blocks[0].ref.generation}


async def test_another_process_that_reads_all_the_while_never_misses_and_never_errs() -> None:
    """Frames of 300 KB, moved and overwritten as fast as this process can."""
    arena = ArenaTier(hammer.SLOTS * 2 * hammer.NBYTES, hammer.SLOTS * 2)
    for slot in range(hammer.SLOTS):
        await arena.write(Place(slot, slot + 1), hammer.filled(arena.allocate(hammer.NBYTES), slot + 1))
    descriptor = arena.share()
    assert descriptor is not None
    command = [sys.executable, "-m", hammer.__name__, str(descriptor), *map(str, arena.geometry)]
    reading = asyncio.create_task(asyncio.to_thread(_output, command, descriptor))
    moves = 0
    while not reading.done():
        slot = moves % hammer.SLOTS
        await arena._relocate(slot, arena._frames[slot], arena.allocate(hammer.NBYTES))
        left = arena.allocate(hammer.NBYTES)  # mostly the place it has just left
        hammer.filled(left, hammer.NOBODY)
        arena.give_up(left)
        moves += 1
    counts = dict(part.split("=") for part in (await reading).split())
    assert counts.pop("wrong") == "0"
    assert counts.pop("stale") == "0"
    assert int(counts.pop("right")) > 100
    assert moves > 100, "nothing was moved meanwhile"
    os.close(descriptor)
    arena.check_integrity()


def _output(command: list[str], descriptor: int) -> str:
    return subprocess.run(
        command, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
