"""A row is believed only when it is whole and of the generation asked for, and tells of every move."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from kvstore.tiers import slot_table
from kvstore.tiers.slot_table import CHECK, GENERATION, OFFSET, SIZE

N_ROWS = 4


def table() -> slot_table.Rows:
    return slot_table.rows_of(memoryview(bytearray(N_ROWS * slot_table.ROW_NBYTES)), N_ROWS)


def current(rows: slot_table.Rows, slot: int, generation: int) -> bool:
    seen, asked = rows[[slot]], np.array([generation], dtype=np.uint64)
    return bool((slot_table.are_of(seen, asked) & slot_table.are_whole(seen))[0])


def test_a_row_is_of_one_generation_until_it_is_withdrawn() -> None:
    rows = table()
    assert not current(rows, 2, 0), "an empty row is of no generation"
    slot_table.publish(rows, 2, generation=7, offset=8192, nbytes=300)
    assert current(rows, 2, 7)
    assert not current(rows, 2, 6)
    assert not current(rows, 1, 7)
    slot_table.withdraw(rows, 2)
    assert not current(rows, 2, 7)
    assert not current(rows, 2, 0)


@pytest.mark.parametrize("column", [OFFSET, SIZE, CHECK])
def test_a_row_seen_half_written_is_not_believed(column: int) -> None:
    rows = table()
    slot_table.publish(rows, 0, generation=7, offset=8192, nbytes=300)
    rows[0, column] += 4096
    assert not current(rows, 0, 7)


def test_a_frame_that_was_moved_away_and_back_has_another_row() -> None:
    rows = table()
    slot_table.publish(rows, 1, generation=7, offset=8192, nbytes=300)
    before = rows[1].copy()
    slot_table.move(rows, 1, 16384, 300)
    assert current(rows, 1, 7), "a move takes nothing out of sight"
    slot_table.move(rows, 1, 8192, 300)
    assert rows[1, OFFSET] == before[OFFSET]
    assert slot_table.nbytes_of(rows[[1]])[0] == 300
    assert (rows[1] != before).any(), "a reader that slept would take another frame's bytes for its own"


def test_turns_begin_anew_when_they_are_used_up() -> None:
    rows = table()
    rows[0, SIZE] = np.uint64((1 << 64) - 1 - slot_table.NBYTES_MAX)
    slot_table.publish(rows, 0, generation=7, offset=8192, nbytes=300)
    assert rows[0, SIZE] == 300
    assert current(rows, 0, 7)


def test_no_mixture_of_a_row_before_during_and_after_a_move_is_believed() -> None:
    """What a reader sees that copies a row column by column, in any order, on any machine."""
    rows = table()
    for before, after, nbytes in [(8192, 4096, 300), (1 << 43, 1 << 42, (1 << 43) + 4096), (8192, 0, 1)]:
        slot_table.publish(rows, 0, generation=7, offset=before, nbytes=nbytes)
        old = rows[0].tolist()
        slot_table.move(rows, 0, after, nbytes)
        new = rows[0].tolist()
        columns = [
            (old[OFFSET], new[OFFSET]),
            (old[SIZE], new[SIZE]),
            (old[CHECK], new[CHECK], old[CHECK] ^ ((1 << 64) - 1)),
        ]
        for mixed in itertools.product(*columns):
            row = [7, *mixed]
            rows[0] = np.array(row, dtype=np.uint64)
            assert current(rows, 0, 7) == (row in (old, new)), row


def test_between_the_steps_of_a_move_the_row_is_the_readers_and_not_whole() -> None:
    rows = table()
    slot_table.publish(rows, 0, generation=7, offset=8192, nbytes=300)
    seen: list[tuple[int, bool]] = []

    class Watched(np.ndarray):
        def __setitem__(self, at: Any, value: Any) -> None:
            super().__setitem__(at, value)
            row = np.asarray(rows[[0]])
            seen.append((int(row[0, GENERATION]), bool(slot_table.are_whole(row)[0])))

    slot_table.move(rows.view(Watched), 0, 4096, 300)
    assert seen == [(7, False), (7, False), (7, False), (7, True)]
