"""One shard as a process, asked by JSON lines: its status, and faults on purpose while engines use it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import kvstore.polling  # noqa: F401 - before anything that imports grpc
from cli.bench.jsonlines import private_output, put
from kvstore import failpoints
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.errors import KVStrataError
from kvstore.nouns import ShardId
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.arena import ArenaTier
from kvstore.tiers.host import HostTier

SHARD = ShardId("shard-0")
SECRET = b"a secret of the tests"


class Served:
    """`shared_memory=False`: frames lie where no reader can map them, so that everything goes over gRPC."""

    def __init__(self, capacity_nbytes: int, port: int, token: str, shared_memory: bool) -> None:
        tier = ArenaTier(capacity_nbytes) if shared_memory else HostTier()
        self.driver = ShardDriver(DriverConfig(SHARD, capacity_nbytes, SECRET, faults=True), tier)
        self.server = ShardServer(self.driver, ServerConfig(port=port, token=token))
        self._let_go = asyncio.Event()

    async def start(self) -> dict[str, Any]:
        await self.driver.start()
        address = await self.server.start()
        return {"address": address, "admin": self.server.admin_address, "pid": os.getpid()}

    async def status(self) -> dict[str, Any]:
        """Raises AssertionError where the shard's books do not balance."""
        self.driver.check_integrity()
        told = await self.driver.status(timeout_s=5.0)
        names = ("versions", "leases", "staged_nbytes", "live_nbytes", "ownerless_nbytes", "counters")
        return {name: getattr(told, name) for name in names} | {"met": dict(failpoints.met)}

    async def flip(self) -> dict[str, Any]:
        key = self.driver.flip_stored_byte()
        return {"key": key.hex() if key else None}

    async def arm(self, point: str, action: str, after: int, times: int) -> dict[str, Any]:
        """`hold`: stand still until `let_go`; `corrupt`: other bytes; `fail`: an error of the storage."""
        self._let_go.clear()
        actions: dict[str, failpoints.Action] = {
            "hold": failpoints.Delay(self._let_go),
            "corrupt": failpoints.Effect.CORRUPT,
            "fail": failpoints.Fail(OSError("EIO")),
        }
        failpoints.met.clear()
        failpoints.arm(point, actions[action], after=after, times=times)
        return {}

    async def disarm(self, point: str) -> dict[str, Any]:
        failpoints.disarm(point)
        self._let_go.set()
        return {}

    async def stop(self) -> None:
        self._let_go.set()
        await self.server.stop(0)
        await self.driver.close()


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    with private_output() as out:
        asked = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
        asked.pop("ask")
        served = Served(**asked)
        put(out, await served.start())
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            asked = json.loads(line)
            handler: Callable[..., Coroutine[Any, Any, dict[str, Any]]] = getattr(served, asked.pop("ask"))
            try:
                put(out, await handler(**asked))
            except (AssertionError, KVStrataError) as error:
                put(out, {"failed": f"{type(error).__name__}: {error}"})
        await served.stop()


if __name__ == "__main__":
    asyncio.run(_serve())
