"""What each policy prefers: the deed it is known for, on a shard of a few blocks."""

from __future__ import annotations

import pytest

from kvstore.policies import POLICIES
from kvstore.policies.ghosts import Ghost, Ghosts
from kvstore.policies.hazard import Learnt
from tests.kvstore.core.conftest import Shard


def scan(shard: Shard, first: int, blocks: int) -> None:
    """So many blocks that nobody will ask for again."""
    for n in range(first, first + 100 * blocks, 100):
        shard.put([n])
        shard.now += 1.0


def kept_through_a_scan(policy: str) -> int:
    """Of ten blocks that are used again and again, on a shard of twenty."""
    shard = Shard(blocks=20, policy=POLICIES[policy], pause_s=float("inf"))
    scan(shard, 100_000, 200)  # what is learnt of blocks used once: they do not come back
    hot = range(0, 1000, 100)
    for _ in range(8):
        for n in hot:
            if not shard.hits([n]):
                shard.put([n])
            shard.now += 1.0
    scan(shard, 200_000, 20)
    return len(shard.present(list(hot)))


@pytest.mark.parametrize("policy", ["s3fifo", "arc", "hazard"])
def test_a_scan_does_not_flush_what_is_used_again_and_again(policy: str) -> None:
    assert kept_through_a_scan(policy) >= 8


def test_lru_is_flushed_by_the_same_scan() -> None:
    assert kept_through_a_scan("lru") == 0


def test_the_hazard_falls_with_age_and_grows_with_what_came_back() -> None:
    learnt = Learnt()
    often, seldom = learnt.place(9, is_last=False), learnt.place(1, is_last=False)
    assert learnt.hazard(often, 10.0) == learnt.hazard(seldom, 10.0)  # the prior
    for _ in range(500):
        learnt.put(often)
        learnt.put(seldom)
        learnt.came_back(often, 60.0)
    assert learnt.hazard(often, 10.0) > 10 * learnt.hazard(seldom, 10.0)
    ages = [learnt.hazard(often, age) for age in (0.0, 1.0, 60.0, 600.0, 6e9)]
    assert ages == sorted(ages, reverse=True)


def test_ghosts_are_remembered_once_in_a_bounded_table() -> None:
    ghosts = Ghosts()
    ghosts.add(12345, Ghost(3, 7, 1.5), 100)
    assert ghosts.take(12345) == Ghost(3, 7, 1.5)
    assert ghosts.take(12345) is None
    for n in range(50_000):
        ghosts.add(n * 0x9E3779B97F4A7C15 % (1 << 64), Ghost(1, 1, float(n)), 1_000)
    assert 1_000 <= len(ghosts) <= 4_096
    assert ghosts.take(49_999 * 0x9E3779B97F4A7C15 % (1 << 64)) == Ghost(1, 1, 49_999.0)


def test_turns_count_uses_that_go_on_from_the_end_of_the_one_before() -> None:
    shard = Shard(blocks=60)
    table, uses = shard.core.index.versions, shard.core.index.uses

    def turn_of(blocks: int, root: int = 0) -> int:
        """A request for so many blocks of a chain, as prefill does it; the turn it was taken for."""
        keys = range(root, root + blocks)
        found, txn = shard.match(keys), shard.begin(keys)
        shard.write(txn)
        pinned = shard.core.commit(txn.id, 60.0, shard.now)
        shard.release(found.lease, pinned.lease)
        return uses.turns[max(pinned.slots, key=table.chain_indexes.__getitem__)]

    assert [turn_of(blocks) for blocks in (3, 6, 9, 9, 20)] == [1, 2, 3, 3, 4]
    assert turn_of(5, root=100) == 1
    assert turn_of(2) == 4  # nothing new
