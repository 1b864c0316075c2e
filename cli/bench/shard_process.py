"""A shard in a process of its own, as `kvstrata store` would run it: host memory behind a gRPC server.

Asked by JSON lines: start (its address), cpu, flip (break a stored byte). Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import IO, Any

from cli.bench.figures import cpu_s
from cli.bench.jsonlines import private_output, put
from kvstore.core.state import CoreLimits
from kvstore.driver import DriverConfig, ShardDriver
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
    driver = ShardDriver(config, HostTier())
    server = ShardServer(driver, ServerConfig())
    await driver.start()
    put(out, {"address": await server.start()})
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        put(out, _answer(driver, json.loads(line)["ask"]))
    await server.stop(0)
    await driver.close()


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
