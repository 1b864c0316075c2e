"""Promise: a tier below with less room than it had shrinks in bounded steps; nothing goes down meanwhile."""

from __future__ import annotations

import pytest

from kvstore.core.versions import ON_HOST
from kvstore.nouns import Tier
from tests.kvstore.core.conftest import NBYTES
from tests.kvstore.core.test_moves import BOTH, CHAIN, fill_host, tiered


def test_a_shrink_gives_up_idle_versions_below_so_many_a_call() -> None:
    shard = tiered(8, 8)
    shard.put(range(8))
    assert shard.move() == 8
    resize, nvme = shard.core.room_below.resize, shard.core.index.nvme
    assert resize(3 * NBYTES, 2) == 2
    shard.core.check_integrity()
    assert nvme.used_nbytes == 6 * NBYTES
    assert resize(3 * NBYTES, 64) == 3
    assert resize(3 * NBYTES, 64) == 0
    shard.core.check_integrity()
    assert [shard.residences(n) for n in range(8)] == [BOTH] * 3 + [ON_HOST] * 5
    assert shard.hits(range(8)) == 8


def test_what_lies_there_alone_is_gone_and_what_is_pinned_stays() -> None:
    shard = tiered(4, 8)
    shard.put(CHAIN)
    shard.move()
    fill_host(shard, 4)
    held = shard.match([0, 1])
    assert shard.core.room_below.resize(NBYTES, 64) == 2
    assert shard.core.room_below.resize(NBYTES, 64) == 0
    shard.core.check_integrity()
    shard.release(held.lease)
    assert shard.core.room_below.resize(NBYTES, 64) == 1
    assert shard.tiers(CHAIN) == [Tier.NVME, None, None, None]


def test_nothing_goes_down_while_there_is_too_much_below() -> None:
    shard = tiered(8, 8)
    shard.put(CHAIN)
    shard.move()
    shard.core.room_below.resize(2 * NBYTES, 1)
    shard.put([100])
    assert not shard.start()
    assert shard.core.index.nvme.used_nbytes == 3 * NBYTES
    shard.core.room_below.resize(2 * NBYTES, 1)
    assert shard.move() == 1
    assert shard.core.index.nvme.used_nbytes == 2 * NBYTES


def test_a_room_that_grows_again_is_used() -> None:
    shard = tiered(8, 8)
    shard.core.room_below.resize(NBYTES, 64)
    shard.core.room_below.resize(4 * NBYTES, 64)
    shard.put(CHAIN)
    assert shard.move() == 4


def test_over_capacity_is_lawful_only_as_far_as_it_was_found_at_the_shrink() -> None:
    shard = tiered(8, 8)
    shard.put(CHAIN)
    shard.move()
    shard.core.room_below.resize(2 * NBYTES, 1)
    shard.core.check_integrity()
    shard.core.index.nvme.ceiling_nbytes -= 1  # as if a byte had come since
    with pytest.raises(AssertionError, match="over capacity"):
        shard.core.check_integrity()


def test_a_full_disk_makes_a_bounded_part_give_way() -> None:
    shard = tiered(8, 8)
    shard.put(range(8))
    shard.move()
    assert shard.core.room_below.give_up(2 * NBYTES, 64) == 2 * NBYTES
    assert shard.core.room_below.give_up(8 * NBYTES, 3) == 3 * NBYTES
    assert shard.core.room_below.give_up(8 * NBYTES, 64) == 3 * NBYTES
    assert shard.core.room_below.give_up(8 * NBYTES, 64) == 0
    assert shard.hits(range(8)) == 8
    shard.core.check_integrity()
