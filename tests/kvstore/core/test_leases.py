"""Leases end by time alone, and never by the shard's own pause."""

from __future__ import annotations

import pytest

from kvstore.core.ids import Ids
from kvstore.core.leases import LeaseTable
from kvstore.errors import OverLimit
from tests.kvstore.core.conftest import INCARNATION


def table(**changes: float) -> LeaseTable:
    limits = {"leases_max": 4, "lease_s_max": 100.0, "pause_s": 2.0} | changes
    return LeaseTable(
        Ids(INCARNATION, b""), int(limits["leases_max"]), limits["lease_s_max"], limits["pause_s"]
    )


def tick(leases: LeaseTable, begin: int, end: int) -> list[int]:
    """The leases that end between two times, in the order they do."""
    past: list[int] = []
    for now in range(begin, end + 1):
        leases.observe(now)
        ended = leases.past_end(now)
        past += ended
        for lease in ended:
            assert leases.end(lease)
    return past


def test_leases_end_in_the_order_of_their_ends() -> None:
    leases = table()
    late, early = leases.grant("a", 5.0, 0), leases.grant("b", 3.0, 0)
    assert tick(leases, 0, 2) == []
    assert tick(leases, 3, 9) == [early, late]
    assert len(leases) == 0


def test_a_renewal_extends_and_never_shortens() -> None:
    leases = table()
    lease = leases.grant("a", 5.0, 0)
    tick(leases, 0, 2)
    assert leases.renew(lease, 1.0, 2)
    assert tick(leases, 3, 4) == []
    assert leases.renew(lease, 5.0, 4)
    assert tick(leases, 5, 8) == []
    assert tick(leases, 9, 9) == [lease]
    assert not leases.renew(lease, 5.0, 9)


def test_work_renews_by_the_leases_own_length() -> None:
    leases = table()
    lease = leases.grant("a", 3.0, 0)
    tick(leases, 0, 2)
    leases.touch(lease, 2)
    assert tick(leases, 3, 4) == []
    assert tick(leases, 5, 5) == [lease]


def test_a_pause_extends_every_lease_by_the_gap() -> None:
    leases = table()
    first, second = leases.grant("a", 3.0, 0), leases.grant("b", 9.0, 0)
    tick(leases, 0, 2)
    assert tick(leases, 62, 62) == []  # 60 seconds stopped
    assert tick(leases, 63, 63) == [first]
    assert tick(leases, 64, 69) == [second]


def test_what_asks_for_nothing_or_too_much_is_bounded() -> None:
    leases = table(lease_s_max=4.0)
    for asked in (-1.0, 0.0, float("nan")):
        lease = leases.grant("a", asked, 0)
        assert not leases.is_live(lease, 0)
        leases.end(lease)
    long = leases.grant("a", float("inf"), 0)
    assert tick(leases, 0, 3) == []
    assert tick(leases, 4, 4) == [long]


def test_the_number_of_leases_is_bounded() -> None:
    leases = table()
    held = [leases.grant("a", 9.0, 0) for _ in range(4)]
    with pytest.raises(OverLimit, match="leases_max"):
        leases.grant("a", 9.0, 0)
    assert leases.end(held[0])
    assert not leases.end(held[0])
    leases.grant("a", 9.0, 0)


def test_memory_follows_the_leases_that_stand() -> None:
    """Neither renewals nor early releases leave anything behind until the leases would have ended."""
    leases = table()
    kept = leases.grant("a", 90.0, 0)
    for n in range(10_000):
        leases.renew(kept, 90.0, n / 1000)
        leases.end(leases.grant("b", 90.0, n / 1000))
    assert len(leases._heap) < 200


def test_the_oldest_is_told_by_age_without_pauses() -> None:
    leases = table()
    assert leases.oldest_s(0) == 0.0
    leases.observe(0)
    leases.grant("a", 90.0, 0)
    leases.observe(1)
    leases.grant("b", 90.0, 1)
    leases.observe(51)
    assert leases.oldest_s(52) == 2.0
