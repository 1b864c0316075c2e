"""The arena: nobody else can write it, no extent has two owners, what is lent stays what it is."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import failpoints
from kvstore.tiers import arena as arena_module
from kvstore.tiers import slot_table
from kvstore.tiers.arena import ArenaTier
from kvstore.tiers.base import Place
from kvstore.tiers.copying import INLINE_NBYTES_MAX, fill
from kvstore.tiers.extents import PAGE_NBYTES
from tests.kvstore.tiers.pages import pages_taken

SIZE = 3 * PAGE_NBYTES
REFUSED = "not permitted|denied|Bad file descriptor|Invalid argument"


def tier(frames: int = 4, slots: int = 64) -> ArenaTier:
    return ArenaTier(frames * SIZE, slots)


def frame_in(arena: ArenaTier, fill: int, nbytes: int = SIZE) -> memoryview:
    room = arena.allocate(nbytes)
    room[:] = bytes([fill]) * nbytes
    return room


async def put(arena: ArenaTier, place: Place, fill: int, nbytes: int = SIZE) -> memoryview:
    frame = frame_in(arena, fill, nbytes)
    await arena.write(place, frame)
    return frame


def opened(arena: ArenaTier, how: int) -> int:
    shared = arena.share()
    assert shared is not None, "this kernel cannot seal memory: the tests of shared memory need one that can"
    try:
        return os.open(f"/proc/self/fd/{shared}", how)
    finally:
        os.close(shared)


@pytest.mark.parametrize("how", [os.O_RDONLY, os.O_RDWR], ids=["as given", "opened anew to write"])
async def test_whoever_has_the_descriptor_can_only_read(how: int) -> None:
    arena = tier()
    frame = await put(arena, Place(0, 1), 7)
    descriptor = opened(arena, how)
    try:
        with pytest.raises(OSError, match=REFUSED):
            mmap.mmap(descriptor, SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match=REFUSED):
            os.pwrite(descriptor, b"x", 0)
        for change in (0, arena.geometry.nbytes * 2):
            with pytest.raises(OSError, match=REFUSED):
                os.ftruncate(descriptor, change)
        with pytest.raises(OSError, match=REFUSED):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
            frame[0] = 9
            assert mapped.find(b"\x09" + b"\x07" * 100) > 0, "it reads what the shard writes"
    finally:
        os.close(descriptor)


async def test_without_seals_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("no such seal")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    arena = tier()
    assert arena.share() is None
    await put(arena, Place(0, 1), 7)
    assert bytes(await arena.read(Place(0, 1)) or b"") == b"\x07" * SIZE


async def test_a_frame_is_read_under_its_own_generation_only() -> None:
    arena = tier()
    await put(arena, Place(3, 1), 1)
    assert await arena.read(Place(3, 2)) is None
    arena.discard(Place(3, 2))
    assert bytes(await arena.read(Place(3, 1)) or b"") == b"\x01" * SIZE
    await put(arena, Place(3, 2), 2)
    assert await arena.read(Place(3, 1)) is None
    await put(arena, Place(3, 1), 1)  # late: the slot is somebody else's
    assert bytes(await arena.read(Place(3, 2)) or b"") == b"\x02" * SIZE
    arena.discard(Place(3, 2))
    assert (arena.nbytes(), pages_taken(arena._free)) == (0, 0)
    arena.check_integrity()


async def test_what_is_lent_stays_what_it_is_and_comes_free_afterwards() -> None:
    arena = tier(frames=1)
    await put(arena, Place(0, 1), 1)
    lent = await arena.borrow(Place(0, 1))
    assert lent is not None
    arena.discard(Place(0, 1))
    others = [await put(arena, Place(slot, 1), 9) for slot in range(1, 4)]
    assert bytes(lent) == b"\x01" * SIZE, "its memory was given to another frame while it was lent"
    assert len(others) == arena.counters["arena:elsewhere"] == 3
    arena.give_back(lent)
    arena.check_integrity()
    await put(arena, Place(5, 1), 5)
    assert arena.counters["arena:elsewhere"] == 3, "its memory was not given back"


async def test_a_frame_without_room_lies_elsewhere_and_readers_are_told() -> None:
    arena = tier(frames=1)
    await put(arena, Place(0, 1), 1)
    await put(arena, Place(1, 1), 2)
    assert arena.counters["arena:elsewhere"] == 1
    assert bytes(await arena.read(Place(1, 1)) or b"") == b"\x02" * SIZE
    assert arena._rows[1, slot_table.GENERATION] == 1
    assert arena._rows[1, slot_table.OFFSET] == 0
    await put(arena, Place(64, 1), 3)  # a slot the table has no row for
    assert bytes(await arena.read(Place(64, 1)) or b"") == b"\x03" * SIZE
    arena.check_integrity()


@pytest.mark.parametrize("action", [failpoints.Fail(OSError("EIO")), failpoints.Effect.DROP], ids=str)
async def test_a_write_that_fails_keeps_nothing(action: failpoints.Action) -> None:
    arena = tier()
    with failpoints.armed("storage.write", action):
        try:
            await put(arena, Place(0, 1), 1)
        except OSError:
            assert isinstance(action, failpoints.Fail)
    assert (arena.nbytes(), pages_taken(arena._free)) == (0, 0)
    await arena.write(Place(0, 1), memoryview(bytearray(b"\x04" * SIZE)))  # of the caller's own memory
    assert pages_taken(arena._free) == 3, "it was moved in"
    lent = frame_in(arena, 5)
    arena.give_up(lent)
    assert pages_taken(arena._free) == 3
    arena.check_integrity()


async def test_a_late_write_that_is_moved_in_slowly_leaves_the_new_owners_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nbytes = INLINE_NBYTES_MAX + 1
    arena = ArenaTier(4 * nbytes, 64)
    started, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def fill_slowly(room: memoryview, *pieces: bytes | memoryview) -> None:
        loop.call_soon_threadsafe(started.set)
        go_on.wait(5)
        fill(room, *pieces)

    monkeypatch.setattr(arena_module, "fill", fill_slowly)
    late = asyncio.ensure_future(arena.write(Place(0, 1), memoryview(bytearray(nbytes))))
    await started.wait()
    await put(arena, Place(0, 2), 2, nbytes)  # the slot was freed and is another block's by now
    go_on.set()
    await late
    assert bytes(await arena.read(Place(0, 2)) or b"") == b"\x02" * nbytes
    assert pages_taken(arena._free) == -(-nbytes // PAGE_NBYTES), "the late write's room was not given up"
    arena.check_integrity()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 3 * PAGE_NBYTES)), max_size=40)
)
def test_any_history_leaves_every_page_with_one_owner(steps: list[tuple[int, int, int]]) -> None:
    asyncio.run(_history(steps))


async def _history(steps: list[tuple[int, int, int]]) -> None:
    arena, stored = tier(frames=3, slots=4), {}
    lent: list[tuple[memoryview, bytes]] = []
    for generation, (kind, slot, nbytes) in enumerate(steps, 1):
        if kind == 0:
            await put(arena, Place(slot, generation), generation % 256, nbytes)
            stored[slot] = generation, bytes([generation % 256]) * nbytes
        elif kind == 1 and slot in stored:
            arena.discard(Place(slot, stored.pop(slot)[0]))
        elif kind == 2 and slot in stored:
            frame = await arena.borrow(Place(slot, stored[slot][0]))
            assert frame is not None
            lent.append((frame, stored[slot][1]))
        elif kind == 3 and lent:
            arena.give_back(lent.pop()[0])
        for frame, content in lent:
            assert frame == content
        for at, (of, content) in stored.items():
            assert bytes(await arena.read(Place(at, of)) or b"") == content
        arena.check_integrity()
