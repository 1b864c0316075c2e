"""A row is believed only when it is whole and of the generation asked for."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.tiers import slot_table


def current(rows: slot_table.Rows, slot: int, generation: int) -> bool:
    asked = np.array([generation], dtype=np.uint64)
    return bool(slot_table.are_current(rows[[slot]], asked)[0])


def test_a_row_is_of_one_generation_until_it_is_withdrawn() -> None:
    rows = slot_table.rows_of(memoryview(bytearray(4 * slot_table.ROW_NBYTES)), 4)
    assert not current(rows, 2, 0), "an empty row is of no generation"
    slot_table.publish(rows, 2, generation=7, offset=8192, nbytes=300)
    assert current(rows, 2, 7)
    assert not current(rows, 2, 6)
    assert not current(rows, 1, 7)
    slot_table.withdraw(rows, 2)
    assert not current(rows, 2, 7)
    assert not current(rows, 2, 0)


@pytest.mark.parametrize("column", [slot_table.OFFSET, slot_table.NBYTES, slot_table.CHECK])
def test_a_row_seen_half_written_is_not_believed(column: int) -> None:
    rows = slot_table.rows_of(memoryview(bytearray(4 * slot_table.ROW_NBYTES)), 4)
    slot_table.publish(rows, 0, generation=7, offset=8192, nbytes=300)
    rows[0, column] += 4096
    assert not current(rows, 0, 7)
