"""The gate between steps and a change: who passes is waited for, nobody passes while it is held."""

from __future__ import annotations

import asyncio

from engine.step_gate import StepGate
from tests.role_parts import WAIT_S


async def test_nobody_passes_while_it_is_held_and_who_passes_is_waited_for() -> None:
    gate, told, go_on = StepGate(), list[str](), asyncio.Event()

    async def step(name: str) -> None:
        await gate.opened()
        with gate.passing():
            told.append(f"{name} begins")
            await go_on.wait()
            told.append(f"{name} ends")

    async def change() -> None:
        async with gate.held():
            told.append("changes")
            await asyncio.sleep(0)
            told.append("changed")

    first = asyncio.create_task(step("first"))
    await asyncio.sleep(0)
    changing = asyncio.create_task(change())
    await asyncio.sleep(0)
    second = asyncio.create_task(step("second"))
    await asyncio.sleep(0)
    assert told == ["first begins"]
    go_on.set()
    await asyncio.gather(first, changing, second)
    assert told == ["first begins", "first ends", "changes", "changed", "second begins", "second ends"]


async def test_who_gives_up_waiting_for_it_leaves_it_open() -> None:
    gate = StepGate()

    async def change() -> None:
        async with gate.held():
            raise AssertionError("a step runs")

    with gate.passing():
        changing = asyncio.create_task(change())
        await asyncio.sleep(0)
        changing.cancel()
        await asyncio.gather(changing, return_exceptions=True)
        async with asyncio.timeout(WAIT_S):
            await gate.opened()
