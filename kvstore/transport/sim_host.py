"""Time and hosts of a simulated world: an event loop whose clock jumps, and places that pause and crash.

A host keeps its own time: monotonic, at a rate and an offset that are its own. A pause stops everything on
it while time goes on, as SIGSTOP does. A crash forgets everything and comes back as another incarnation; a
host may be doomed to crash at its next call of one kind, so that rare calls meet crashes too.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from kvstore.driver import ShardDriver
from kvstore.nouns import ShardId

Answer = TypeVar("Answer")

_TICK_S: Final = 0.5


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing is ready. For one process alone."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_NoWaiting(self))

    def time(self) -> float:
        return self._now

    def pass_time(self, seconds: float) -> None:
        self._now += seconds


class _NoWaiting(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("every task waits for ever: the simulated world has come to a halt")
        self._loop.pass_time(timeout)
        return []  # nothing here ever comes from outside


class SimClock:
    """A host's own monotonic time."""

    def __init__(self, rate: float, offset: float) -> None:
        self._rate = rate
        self._offset = offset

    def now(self) -> float:
        return asyncio.get_running_loop().time() * self._rate + self._offset


class SimHost:
    """A place for one shard. `make` gives a driver for each of its lives."""

    def __init__(self, shard: ShardId, make: Callable[[SimHost], ShardDriver], clock: SimClock) -> None:
        self.shard = shard
        self.clock = clock
        self.crashes = 0
        self.doom: str | None = None  # crashes at its next call of this kind: before or after it took effect
        self.tick_s = _TICK_S
        self._make = make
        self._awake = asyncio.Event()
        self._awake.set()
        self._calls: dict[asyncio.Task[Any], None] = {}  # in the order they came in: no history hangs on ids
        self._ends: list[asyncio.Task[None]] = []  # of past lives
        self._begin()
        self._reaper = asyncio.create_task(self._reap_forever())

    async def awake(self) -> None:
        await self._awake.wait()

    @property
    def is_awake(self) -> bool:
        return self._awake.is_set()

    def pause(self) -> None:
        self._awake.clear()

    def resume(self) -> None:
        self._awake.set()

    def crash(self) -> None:
        """Lose everything; be back at once as another incarnation."""
        self.crashes += 1
        self.doom = None
        for call in self._calls:
            call.cancel()
        self._starting.cancel()
        self._ends.append(asyncio.create_task(self.driver.close()))
        self._begin()

    async def ready(self) -> None:
        """Until the host runs and its shard has recovered. Raises what kept it from that."""
        await self.awake()
        await self._up.wait()
        if self._starting.done() and not self._starting.cancelled():
            self._starting.result()

    def run(
        self, step: str, call: Callable[[ShardDriver], Awaitable[Answer]], before_s: float, after_s: float
    ) -> asyncio.Task[Answer]:
        """Serve a call that waited for its turn; its answer too takes time to leave the host."""

        async def served() -> Answer:
            await asyncio.sleep(before_s)
            await self.ready()
            if self.doom == step and before_s < after_s:
                self.crash()
                await asyncio.sleep(0)  # ends here
            answer = await call(self.driver)
            if self.doom == step:
                self.crash()
            await asyncio.sleep(after_s)
            return answer

        task = asyncio.create_task(served())
        self._calls[task] = None
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        self.resume()
        for task in (self._reaper, self._starting):
            task.cancel()
        await self.driver.close()
        await asyncio.gather(self._reaper, self._starting, *self._ends, *self._calls, return_exceptions=True)

    def _begin(self) -> None:
        self.driver, self._up = self._make(self), asyncio.Event()
        self._starting = asyncio.create_task(self._recover(self.driver, self._up))

    async def _recover(self, driver: ShardDriver, up: asyncio.Event) -> None:
        try:
            await driver.recover()
        finally:
            up.set()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._calls[task]
        if not task.cancelled():
            task.exception()  # whoever called may have gone

    async def _reap_forever(self) -> None:
        while True:
            await asyncio.sleep(self.tick_s)
            await self.ready()
            await self.driver.tick()
