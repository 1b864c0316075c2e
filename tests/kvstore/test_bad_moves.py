"""Promise: a block that cannot move costs its own move, not those of the others."""

from __future__ import annotations

import errno

import pytest

from kvstore.core.state import DemoteWhen
from kvstore.mover import RETRY_S
from kvstore.tiers.base import Place
from tests.kvstore.durable import E1, Tiered, wanted
from tests.kvstore.oracle import FRAME_NBYTES, put

FOUR = [0, 1, 2, 3]  # all in one batch, on a host of 32 frames


class Refusing:
    """A method of a tier that fails for some places; it counts how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tier: object, method: str, number: int) -> None:
        self.places: set[Place] = set()
        self.refused = 0
        self._real = getattr(tier, method)
        self._number = number
        monkeypatch.setattr(tier, method, self._called)

    async def _called(self, place: Place, *frame: memoryview) -> object:
        if place in self.places:
            self.refused += 1
            raise OSError(self._number, "not this one")
        return await self._real(place, *frame)


async def test_a_source_that_cannot_be_read_costs_its_own_move(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = await Tiered(host_frames=32).open()
    busy = Refusing(monkeypatch, shard.host, "borrow", errno.EBUSY)
    await put(shard.driver, shard.keys, FOUR, E1)
    busy.places = {shard.place(1)}
    await shard.move()
    assert (busy.refused, shard.driver.core.counters[f"source_failed:{errno.EBUSY}"]) == (1, 1)
    assert shard.below.nbytes() == 3 * FRAME_NBYTES
    await shard.put([4])  # and nobody has to wait
    assert shard.below.nbytes() == 4 * FRAME_NBYTES
    busy.places = set()
    assert await shard.seen() == wanted(range(5), shard.keys)
    await shard.move()
    assert shard.below.nbytes() == 5 * FRAME_NBYTES
    shard.all_is_well()


async def test_a_frame_that_is_too_large_below_costs_its_own_move_and_is_not_named_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = await Tiered(host_frames=32).open()
    large = Refusing(monkeypatch, shard.below, "write", errno.EFBIG)
    await put(shard.driver, shard.keys, FOUR, E1)
    large.places = {shard.place(1)}
    for _ in range(3):
        await shard.move()
        assert await shard.seen() == wanted(FOUR, shard.keys)
    assert large.refused == shard.driver.core.counters[f"nvme_failed:{errno.EFBIG}"] == 1
    assert shard.below.nbytes() == 3 * FRAME_NBYTES
    shard.all_is_well()


async def test_who_cannot_be_read_and_is_next_to_go_is_not_tried_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = await Tiered(host_frames=8, when=DemoteWhen.CROWDED, watermarks=(0.4, 0.1)).open()
    shard.driver.core.moves._admission = None  # whoever is next to go may go below
    busy = Refusing(monkeypatch, shard.host, "borrow", errno.EBUSY)
    await put(shard.driver, shard.keys, FOUR, E1)
    busy.places = {shard.place(i) for i in FOUR}
    for _ in range(5):
        await shard.mover.step()
    assert busy.refused == 1
    shard.clock.advance(RETRY_S)
    busy.places = set()
    await shard.move()
    assert shard.below.nbytes() > 0
    shard.all_is_well()
