"""Which answers go on when weights change, and who may begin meanwhile."""

from __future__ import annotations

import asyncio
import itertools

from kvstore.nouns import Epoch, WeightsDigest
from router.epochs import Intake, Transitions

E = [Epoch(n, WeightsDigest(bytes([n]) * 16)) for n in range(9)]


def test_an_answer_goes_on_as_far_as_every_update_on_its_way_lets_it() -> None:
    known = Transitions()
    known.over([E[1]], E[2], goes_on=True)
    known.over([E[2]], E[3], goes_on=True)
    assert [known.leads(E[1], e) for e in E[:5]] == [False, True, True, True, False]
    assert not known.leads(E[3], E[1]), "never back"
    assert not known.is_over(E[1])
    known.over([E[3]], E[4], goes_on=False)
    assert [known.is_over(e) for e in E[1:5]] == [True, True, True, False]
    assert not known.leads(E[1], E[4])
    assert known.leads(E[1], E[3]), "a worker that has not changed yet may still end it"


def test_what_is_remembered_is_bounded_and_forgetting_never_lets_anything_go_on() -> None:
    known = Transitions()
    many = [Epoch(n, WeightsDigest(bytes(16))) for n in range(1000)]
    for old, new in itertools.pairwise(many):
        known.over([old], new, goes_on=True)
    assert known.leads(many[-2], many[-1])
    assert not known.leads(many[0], many[-1])
    assert len(known._next) <= 256


async def test_an_intake_that_is_held_lets_nobody_begin_and_tells_when_all_have_ended() -> None:
    intake, told, end = Intake(), list[str](), asyncio.Event()

    async def request(name: str) -> None:
        async with intake.passing():
            told.append(name)
            await end.wait()

    first = asyncio.create_task(request("first"))
    await asyncio.sleep(0)
    with intake.held():
        second = asyncio.create_task(request("second"))
        emptied = asyncio.create_task(intake.emptied())
        await asyncio.sleep(0)
        assert (told, emptied.done()) == (["first"], False)
        end.set()
        await asyncio.gather(first, emptied)
        assert told == ["first"]
    await second
    assert told == ["first", "second"]
