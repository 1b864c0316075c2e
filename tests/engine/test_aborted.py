"""Aborts that came first are remembered: by attempt, for a while, and not too many."""

from __future__ import annotations

from engine.aborted import KEPT_MAX, KEPT_S, AbortedAttempts
from kvstore.clock import ManualClock


def test_an_abort_covers_its_attempt_and_earlier_ones_for_a_while() -> None:
    clock = ManualClock()
    aborted = AbortedAttempts(clock)
    aborted.remember("r", 2)
    aborted.remember("r", 1)  # came late: takes nothing back
    assert [aborted.covers("r", attempt) for attempt in (1, 2, 3)] == [True, True, False]
    assert not aborted.covers("s", 1)
    clock.advance(KEPT_S)
    assert not aborted.covers("r", 2)


def test_the_oldest_are_forgotten_beyond_the_bound() -> None:
    aborted = AbortedAttempts(ManualClock())
    for i in range(KEPT_MAX + 1):
        aborted.remember(f"r{i}", 1)
    assert len(aborted) == KEPT_MAX
    assert not aborted.covers("r0", 1)
    assert aborted.covers(f"r{KEPT_MAX}", 1)
