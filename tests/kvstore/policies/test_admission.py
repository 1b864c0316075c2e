"""Prediction of continuation, and which versions are worth a write to the next tier."""

from __future__ import annotations

import pytest

from kvstore.core.uses import Uses
from kvstore.policies.admission import ADMISSIONS
from kvstore.policies.continuation import Continuation
from tests.kvstore.core.conftest import Shard


class Sessions:
    """A shard whose uses a predictor hears of."""

    def __init__(self) -> None:
        self.shard = Shard(blocks=10_000, pause_s=float("inf"))
        self.uses: Uses = self.shard.core.index.uses
        self.predictor = Continuation(self.uses)
        self.uses.observers.append(self.predictor.observe)

    def turn(self, root: int, blocks: int) -> int:
        """A request for so many blocks of a chain; the slot of its last block."""
        keys = range(root, root + blocks)
        found, txn = self.shard.match(keys), self.shard.begin(keys)
        self.shard.write(txn)
        pinned = self.shard.core.commit(txn.id, 60.0, self.shard.now)
        self.shard.release(found.lease, pinned.lease)
        return pinned.slots[-1]

    def probability(self, slot: int, within_s: float = 600.0) -> float:
        return self.predictor.probability(slot, within_s, self.shard.now)


def test_before_anything_is_seen_the_priors_speak() -> None:
    sessions = Sessions()
    first = sessions.turn(0, 2)
    second = (sessions.turn(100, 2), sessions.turn(100, 4))[1]
    assert 0.2 < sessions.probability(first) < sessions.probability(second) < 0.5


def test_what_went_on_before_is_expected_to_go_on_and_what_did_not_is_not() -> None:
    going, ending = Sessions(), Sessions()
    for n in range(200):
        for sessions in (going, ending):
            sessions.shard.now += 60.0
            sessions.turn(100 * n, 2)
        going.shard.now += 30.0
        going.turn(100 * n, 4)
    assert going.probability(going.turn(90_000, 2)) > 0.7
    assert ending.probability(ending.turn(90_000, 2)) < 0.1


def test_the_longer_a_session_is_silent_the_less_it_is_expected() -> None:
    sessions = Sessions()
    slot = sessions.turn(0, 2)
    chances = []
    for _ in range(5):
        chances.append(sessions.probability(slot, 60.0))
        sessions.shard.now += 200.0
    assert chances == sorted(chances, reverse=True)
    assert chances[-1] < chances[0] / 10
    assert sessions.probability(slot, 600.0) > sessions.probability(slot, 60.0)


@pytest.mark.parametrize(
    ("policy", "first_turn", "second_turn", "used_twice"),
    [
        ("always", True, True, True),
        ("second_use", False, False, True),
        ("predicted_reuse", False, True, True),
    ],
)
def test_which_versions_are_written(
    policy: str, first_turn: bool, second_turn: bool, used_twice: bool
) -> None:
    sessions = Sessions()
    admission = ADMISSIONS[policy](sessions.uses, sessions.predictor)
    assert admission.admits(sessions.turn(0, 2), 0.0) is first_turn
    again = sessions.turn(0, 4)
    assert admission.admits(again, 0.0) is second_turn
    sessions.turn(0, 4)
    assert admission.admits(again, 0.0) is used_twice
