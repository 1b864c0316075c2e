"""Slots: conservation, adjacency, and a generation for every reuse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.slots import SlotTable
from kvstore.errors import OverLimit


def picture(table: SlotTable) -> str:
    return "".join(table.owner(slot) or "." for slot in range(len(table)))


def test_the_worked_example() -> None:
    table = SlotTable(8)
    assert table.allocate(3, "a") == [0, 1, 2]
    assert table.allocate(2, "b") == [3, 4]
    table.free([0, 1, 2])
    assert picture(table) == "...bb..."
    assert [table.generation(slot) for slot in range(4)] == [2, 2, 2, 1]
    assert table.allocate(2, "c") == [0, 1]
    assert table.allocate(1, "b", after=4) == [5]
    assert table.allocate(3, "d") == [6, 7, 2]
    assert picture(table) == "ccdbbbdd"
    table.check_integrity()


def test_a_reference_outlives_its_slot_only_as_a_stale_one() -> None:
    table = SlotTable(1)
    table.allocate(1, "a")
    before = table.generation(0)
    assert table.is_current(0, before)
    table.free([0])
    assert not table.is_current(0, before)
    table.allocate(1, "b")
    assert not table.is_current(0, before)
    assert table.is_current(0, table.generation(0))
    assert not SlotTable(1).is_current(0, 0)


def test_too_many_takes_nothing() -> None:
    table = SlotTable(4)
    table.allocate(2, "a")
    assert not table.can_allocate(3)
    with pytest.raises(OverLimit, match="3 slots asked for, 2 of 4"):
        table.allocate(3, "b")
    assert picture(table) == "aa.."
    assert table.allocate(0, "b") == []


def test_nonsense_is_refused() -> None:
    table = SlotTable(2)
    with pytest.raises(KeyError):
        table.free([1])
    with pytest.raises(ValueError, match="none or more"):
        table.allocate(-1, "a")
    with pytest.raises(ValueError, match="at least one"):
        SlotTable(0)


def test_after_the_last_slot_there_is_none() -> None:
    table = SlotTable(3)
    assert table.allocate(1, "a", after=1) == [2]
    assert table.allocate(1, "a", after=2) == [0]
    assert [table.owner(slot) for slot in range(3)] == ["a", None, "a"]


steps = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(-1, 12)), max_size=60)


@settings(derandomize=True, max_examples=150)
@given(steps)
def test_every_slot_is_free_or_held_once(steps: list[tuple[int, int, int]]) -> None:
    table = SlotTable(12)
    model: dict[int, str] = {}
    for n, who, after in steps:
        owner = "abcd"[who]
        if n == 0:
            mine = [slot for slot, held_by in model.items() if held_by == owner]
            table.free(mine)
            for slot in mine:
                del model[slot]
        elif table.can_allocate(n):
            taken = table.allocate(n, owner, after=None if after < 0 else after)
            assert len(set(taken)) == n
            assert model.keys().isdisjoint(taken)
            model |= dict.fromkeys(taken, owner)
        else:
            assert n > 12 - len(model)
        assert table.n_free == 12 - len(model)
        assert all(table.owner(slot) == model.get(slot) for slot in range(12))
        table.check_integrity()


def test_a_free_run_is_found_around_what_others_claim() -> None:
    table = SlotTable(12)
    table.allocate(2, "a")
    assert table.free_run(3, ()) == 2
    assert table.free_run(3, [range(2, 6)]) == 6
    assert table.free_run(3, [range(2, 6)], after=7) == 8
    assert table.free_run(3, [range(2, 6)], after=1) == 6
    assert table.free_run(7, [range(2, 6)]) is None
    assert table.n_free == 10, "nothing is taken"
