"""A shard in a process of its own, as `kvstrata store` would run it: host memory behind a gRPC server.

Asked by JSON lines: start (its address), cpu, flip (break a stored byte). Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys
from typing import IO, Any

import kvstore.polling  # noqa: F401 - before anything that imports grpc
from cli.bench.figures import cpu_s
from cli.bench.jsonlines import private_output, put
from kvstore.core.state import CoreLimits
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.memory import keep_freed_buffers
from kvstore.nouns import ShardId
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.host import HostTier

SHARD = ShardId("bench")


async def _serve(out: IO[str]) -> None:
    loop = asyncio.get_running_loop()
    asked = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    config = DriverConfig(
        SHARD,
        asked["capacity_nbytes"],
        b"a secret of the benchmark",
        limits=CoreLimits(slots_max=asked["slots"]),
        faults=True,
    )
    driver = ShardDriver(config, _memory(config.capacity_nbytes))
    server = ShardServer(driver, ServerConfig(token=asked["token"]))
    await driver.start()
    put(out, {"address": await server.start()})
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        put(out, _answer(driver, json.loads(line)["ask"]))
    await server.stop(0)
    await driver.close()


def _memory(capacity_nbytes: int) -> Any:
    """What a shard keeps frames in: an arena that readers may map, in versions that have one."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module("kvstore.tiers.arena").ArenaTier(capacity_nbytes)
    return HostTier()


def _answer(driver: ShardDriver, asked: str) -> dict[str, Any]:
    if asked == "flip":
        key = driver.flip_stored_byte()
        return {"key": key.hex() if key else None}
    return {"cpu_s": cpu_s()}


def main() -> None:
    keep_freed_buffers()
    with private_output() as out:
        asyncio.run(_serve(out))


if __name__ == "__main__":
    main()
