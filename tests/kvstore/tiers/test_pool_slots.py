"""Promise: a slot changes hands only when nobody uses it and no block is kept in it, whatever ends first."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvstore.errors import OverLimit
from kvstore.tiers.pool_slots import PoolCounts, PoolSlots


def test_a_kept_slot_outlives_its_users_and_a_used_one_its_block() -> None:
    slots = PoolSlots(4)
    a, b = slots.allocate(2, "r")
    slots.keep(a)
    slots.keep(b)
    slots.give_back([a, b])
    assert slots.counts() == PoolCounts(free=2, private=0, kept=2)
    slots.lend([a])
    slots.drop(a)  # evicted while it is read
    assert slots.counts() == PoolCounts(free=2, private=1, kept=1)
    assert a not in slots.allocate(2, "other")
    slots.give_back([a])
    assert slots.counts() == PoolCounts(free=1, private=2, kept=1)


def test_what_does_not_fit_takes_nothing() -> None:
    slots = PoolSlots(2)
    assert len(slots.take_kept(1)) == 1
    with pytest.raises(OverLimit):
        slots.allocate(2, "r")
    assert slots.counts() == PoolCounts(free=1, private=0, kept=1)


def test_misuse_is_told_at_once() -> None:
    slots = PoolSlots(2)
    (slot,) = slots.allocate(1, "r")
    with pytest.raises(AssertionError, match="is free"):
        slots.lend([1 - slot])
    slots.give_back([slot])
    with pytest.raises(AssertionError, match="twice"):
        slots.give_back([slot])
    with pytest.raises(AssertionError, match="in use by nobody"):
        slots.keep(slot)
    with pytest.raises(AssertionError, match="not kept"):
        slots.drop(slot)


@pytest.mark.parametrize("seed", range(8))
def test_conservation_over_random_histories(seed: int) -> None:
    """free + private + kept is all there is, after every step of a random history."""
    draw, slots = random.Random(seed), PoolSlots(12)
    users: Counter[int] = Counter()
    kept: set[int] = set()
    for _ in range(400):
        deed = draw.choice(["allocate", "lend", "give back", "keep", "drop", "arrive"])
        used, held = [slot for slot in users if users[slot]], {*kept, *+users}
        if deed == "allocate" and len(held) < 12:
            taken = slots.allocate(draw.randint(1, 12 - len(held)), "r")
            assert not held & {*taken}, "a slot changed hands while somebody had it"
            users.update(taken)
        elif deed == "arrive" and len(held) < 12:
            (slot,) = slots.take_kept(1)
            assert slot not in held
            kept.add(slot)
        elif deed == "lend" and held:
            slot = draw.choice(sorted(held))
            slots.lend([slot])
            users[slot] += 1
        elif deed == "give back" and used:
            slot = draw.choice(used)
            slots.give_back([slot])
            users[slot] -= 1
        elif deed == "keep" and {*used} - kept:
            slot = draw.choice(sorted({*used} - kept))
            slots.keep(slot)
            kept.add(slot)
        elif deed == "drop" and kept:
            slot = draw.choice(sorted(kept))
            slots.drop(slot)
            kept.discard(slot)
        slots.check_integrity(+users, kept)
        assert sum(slots.counts()) == 12
