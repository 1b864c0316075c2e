"""Methods of a shard that answer when the test says so, and waits for what nobody tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.kvstore.conftest import Served
from tests.kvstore.oracle import TIMEOUT


class Stall:
    """A method of the driver that answers when told."""

    def __init__(self, served: Served, patch: pytest.MonkeyPatch, method: str) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        self._method = getattr(served.driver, method)
        patch.setattr(served.driver, method, self._stall)

    async def _stall(self, *args: Any, **named: Any) -> Any:
        self.reached.set()
        await self.go_on.wait()
        return await self._method(*args, **named)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not holds():  # noqa: ASYNC110 - what the other side did is told to nobody here
            await asyncio.sleep(0)
