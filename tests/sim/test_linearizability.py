"""The checker itself: histories that it must accept, and must not; and what is broken is found."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest

from kvstore.nouns import BlockRef, Incarnation, ShardId
from tests.sim.history import NotLinearizable
from tests.sim.linearizability import Kind, Op, is_linearizable
from tests.sim.test_mutations import purge_of_keys, silent, tardy
from tests.sim.world import run_seed

__all__ = ["silent"]

A, B, C = (BlockRef(ShardId("shard"), Incarnation(7), slot, 1) for slot in range(3))
BETTER = {A: 800, B: 1000, C: 1000}


def write(invoked: int, returned: float, version: BlockRef | None) -> Op:
    return Op(Kind.WRITE, invoked, returned, version=version)


def read(invoked: int, returned: float, version: BlockRef | None, least: int = 0) -> Op:
    return Op(Kind.READ, invoked, returned, version=version, least=least)


def purge(invoked: int, returned: float) -> Op:
    return Op(Kind.PURGE, invoked, returned)


HISTORIES: dict[str, tuple[bool, list[Op], set[BlockRef]]] = {
    "nothing was ever written": (True, [read(1, 2, None)], set()),
    "written, seen": (True, [write(1, 2, A), read(3, 4, A)], set()),
    "seen while it is written": (True, [read(1, 4, A), write(2, 3, A)], set()),
    "seen before it is written": (False, [read(1, 2, A), write(3, 4, A)], set()),
    "seen and never written": (False, [read(1, 2, A)], set()),
    "a miss is legal": (True, [write(1, 2, A), read(3, 4, None)], set()),
    "not of what is held": (False, [write(1, 2, A), read(3, 4, None)], {A}),
    "but of what is held and not good enough": (True, [write(1, 2, A), read(3, 4, None, 1000)], {A}),
    "what vanished comes back": (
        False,
        [write(1, 2, A), read(3, 4, A), read(5, 6, None), read(7, 8, A)],
        set(),
    ),
    "two versions in turns": (
        False,
        [write(1, 2, A), write(3, 4, B), read(5, 6, A), read(7, 8, B), read(9, 10, A)],
        set(),
    ),
    "two writers at once, in some order": (
        True,
        [write(1, 9, A), write(2, 8, B), read(3, 4, A), read(5, 6, B), read(10, 11, B)],
        set(),
    ),
    "the better one wins over what is held": (True, [write(1, 2, A), write(3, 4, B), read(5, 6, B)], {A, B}),
    "an equal one does not": (False, [write(1, 2, B), write(3, 4, C)], {B}),
    "the second writer is answered with the first": (True, [write(1, 2, A), write(3, 4, A)], {A}),
    "purged, gone": (True, [write(1, 2, A), purge(3, 4), read(5, 6, None)], {A}),
    "purged, and seen": (False, [write(1, 2, A), purge(3, 4), read(5, 6, A)], set()),
    "purged, and written again": (
        True,
        [write(1, 2, A), purge(3, 4), write(5, 6, B), read(7, 8, B)],
        {A, B},
    ),
    "a purge whose outcome is unknown": (True, [write(1, 2, A), purge(3, inf), read(5, 6, None)], {A}),
    "which happens once": (
        False,
        [write(1, 2, A), purge(3, inf), read(5, 6, None), write(7, 8, B), read(9, 10, None)],
        {A, B},
    ),
    "a commit whose answer was lost": (True, [write(1, inf, None), read(2, 3, None), read(4, 5, A)], set()),
    "is no two commits": (
        False,
        [write(1, inf, None), read(2, 3, A), read(4, 5, B)],
        set(),
    ),
    "nor is it made before it is asked for": (False, [read(1, 2, A), write(3, inf, None)], set()),
    "an epoch may be dropped": (True, [write(1, 2, A), Op(Kind.DROP, 3, inf), read(5, 6, None)], {A}),
    "or not": (True, [write(1, 2, A), Op(Kind.DROP, 3, inf), read(5, 6, A)], {A}),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_is_told_from_one_that_can_not_be(name: str) -> None:
    can_be, ops, held = HISTORIES[name]
    assert is_linearizable(ops, lambda version, _: version in held, BETTER) is can_be
    assert is_linearizable(ops[::-1], lambda version, _: version in held, BETTER) is can_be


@pytest.mark.parametrize("mutation", [purge_of_keys, tardy], ids=lambda m: m.__name__)
def test_it_finds_what_is_broken_by_itself(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other checks see these too, most often first; here only the registers count."""
    mutation(monkeypatch)
    for check in ("check_not_purged", "sure"):
        monkeypatch.setattr(f"tests.sim.client.Client.{check}", lambda *_: None)
    for seed in range(100):
        try:
            run_seed(seed)
        except NotLinearizable:
            return
        except AssertionError:
            continue
    pytest.fail("not found")
