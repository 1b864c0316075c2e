"""Shards and engines that stand still at a named point until a test lets them go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from engine.engine import Engine
from engine.types import StepResult, TailKV
from kvstore.clock import Clock
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.nouns import Refusal, ShardId
from kvstore.tiers.host import HostTier
from kvstore.transport.base import CommitResult, MatchResult, ReadItem, TxnOpened
from tests.role_parts import SECRET, WAIT_S


class Gate:
    """`await reached()` returns once somebody stands at point `at`; `open()` lets all go on, for good."""

    def __init__(self) -> None:
        self.at = ""
        self._reached = asyncio.Event()
        self._open = asyncio.Event()

    async def stand(self, point: str) -> None:
        if point == self.at:
            self._reached.set()
            async with asyncio.timeout(WAIT_S):
                await self._open.wait()

    async def reached(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self._reached.wait()

    def open(self) -> None:
        self._open.set()


class GatedShard(ShardDriver):
    """Stands still before or after any of its calls: "match before", "commit after" ..."""

    POINTS = ("match", "read", "begin", "write", "commit", "release")

    def __init__(self, name: str = "s0", clock: Clock | None = None) -> None:
        super().__init__(DriverConfig(ShardId(name), 64 << 20, SECRET), HostTier(), clock)
        self.gate = Gate()

    async def match(self, *args: Any, **kwargs: Any) -> MatchResult:
        await self.gate.stand("match before")
        answer = await super().match(*args, **kwargs)
        await self.gate.stand("match after")
        return answer

    async def read(self, *args: Any, **kwargs: Any) -> AsyncIterator[ReadItem]:
        await self.gate.stand("read before")
        async for item in super().read(*args, **kwargs):
            yield item
            await self.gate.stand("read after")

    async def begin(self, *args: Any, **kwargs: Any) -> TxnOpened:
        await self.gate.stand("begin before")
        answer = await super().begin(*args, **kwargs)
        await self.gate.stand("begin after")
        return answer

    async def write(self, *args: Any, **kwargs: Any) -> list[Refusal | None]:
        await self.gate.stand("write before")
        answer = await super().write(*args, **kwargs)
        await self.gate.stand("write after")
        return answer

    async def commit(self, *args: Any, **kwargs: Any) -> CommitResult:
        await self.gate.stand("commit before")
        answer = await super().commit(*args, **kwargs)
        await self.gate.stand("commit after")
        return answer

    async def release(self, *args: Any, **kwargs: Any) -> None:
        await self.gate.stand("release before")
        await super().release(*args, **kwargs)
        await self.gate.stand("release after")


class GatedEngine(Engine):
    """Stands still in the engine thread, inside the call named by `at`. Fails the next step with `error`."""

    at = ""
    error: Exception | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entered = threading.Event()
        self.opened = threading.Event()

    def admit(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        self._stand("admit")
        return super().admit(*args, **kwargs)

    def step(self) -> StepResult:
        self._stand("step")
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().step()

    def take_tail(self, request_id: str) -> TailKV | None:
        self._stand("take_tail")
        return super().take_tail(request_id)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, WAIT_S)

    def _stand(self, point: str) -> None:
        if point == self.at:
            self.entered.set()
            assert self.opened.wait(WAIT_S)
