"""A rate follows what changes and is not led astray by one measurement."""

from __future__ import annotations

import pytest

from kvstore.rates import OUTLIER, Rate


def test_it_is_what_was_measured_and_nothing_before() -> None:
    rate = Rate()
    assert (rate.a_second, rate.count) == (0.0, 0)
    rate.measured(10, 2.0)
    assert (rate.a_second, rate.count) == (5.0, 1)


def test_what_took_no_time_and_a_first_try_in_vain_tell_nothing() -> None:
    rate = Rate()
    for amount, seconds in ((5, 0.0), (5, -1.0), (0, 1.0), (-1, 1.0)):
        rate.measured(amount, seconds)
    assert (rate.a_second, rate.count) == (0.0, 0)


def test_it_follows_a_change_in_about_twenty_measurements() -> None:
    for before, after in ((100.0, 10.0), (10.0, 100.0)):
        rate = Rate()
        for speed in [before] * 20 + [after] * 25:
            rate.measured(speed, 1.0)
        assert rate.a_second == pytest.approx(after, rel=0.1)


def test_a_standstill_counts_as_a_slow_measurement_and_no_more() -> None:
    rate = Rate()
    for seconds in [1.0] * 20 + [3600.0]:
        rate.measured(100, seconds)
    assert rate.a_second > 100 / OUTLIER


def test_a_disk_that_answers_no_more_gets_slower_with_each_try() -> None:
    rate = Rate()
    for amount in (100, 0, 0, 0):
        rate.measured(amount, 1.0)
    assert 0 < rate.a_second < 60
