"""Processes of their own for benchmarks, a shard above all, which is read and written from another.

Both poll, as the store's own processes and the engines' do.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import kvstore.polling  # noqa: F401 - before anything that imports grpc
from cli.bench.figures import cpu_s
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.memory import keep_freed_buffers
from kvstore.nouns import ShardId
from kvstore.server import ServerConfig, ShardServer
from kvstore.tiers.arena import ArenaTier

Pipe = multiprocessing.connection.Connection
SHARD = ShardId("bench")


@contextmanager
def apart(target: Callable[..., None], *args: object) -> Iterator[Pipe]:
    """`target(pipe, *args)` runs in a fresh process until the block ends; the pipe's other end is ours."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.terminate()
        process.join()


def serve(pipe: Pipe, arena_nbytes: int, token: str | None = None) -> None:
    """Tell the address; answer each true message with the CPU seconds used so far; end at a false one."""
    keep_freed_buffers()

    async def run() -> None:
        config = DriverConfig(SHARD, arena_nbytes, b"a secret of the benchmark")
        server = ShardServer(ShardDriver(config, ArenaTier(arena_nbytes)), ServerConfig(token=token))
        pipe.send(await server.start())
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, pipe.recv):
            pipe.send(cpu_s())
        await server.stop(0)

    asyncio.run(run())
