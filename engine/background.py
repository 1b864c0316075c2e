"""Tasks that nobody waits for: kept so that they are not collected, their errors logged and counted.

Releasing a lease, finishing a publication, freeing what an aborted request held: the caller must not wait
for these and must not lose them. Bounded by what spawns them; `settle` waits for all, within a bound.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

__all__ = ["Background"]

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Background:
    """One event loop's. `counters["background:failed"]` counts tasks that ended in an error."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work` to its end. Whoever awaits the task as well gets its error too."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def settle(self, timeout_s: float) -> bool:
        """Wait until nothing runs, tasks spawned meanwhile included. False: the time was up first."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        except TimeoutError:
            return False
        return True

    async def close(self, timeout_s: float) -> None:
        """Settle within `timeout_s`, then cancel what is left."""
        if not await self.settle(timeout_s):
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.counters["background:failed"] += 1
            log.error("background task failed", task=task.get_name(), exc_info=error)
