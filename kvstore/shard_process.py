"""One shard as a process of its own, without Ray: what `kvstrata store` starts, once a shard.

    stdin   one line: how to start (JSON); later lines: topologies. Its end: drain, and exit
    stdout  one line: where it listens (JSON), or why it does not
    stderr  the log

A process each, since a shard's loop is one interpreter's work: N shards in one process would be as fast as
one. Standard input is the lifeline: whoever started it may be killed in any way, and the shard still ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from typing import Any, Final

import kvstore.polling  # noqa: F401 - before anything that imports grpc
from kvstore.config import StoreConfig
from kvstore.errors import KVStrataError
from kvstore.logs import log_plainly
from kvstore.memory import keep_freed_buffers
from kvstore.nouns import ShardId
from kvstore.server import ShardServer
from kvstore.starting import new_driver
from kvstore.topology import ShardEntry, Topology

LINE_NBYTES_MAX: Final = 1 << 20


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for whoever started us
    log_plainly(logging.WARNING, sys.stderr)
    return asyncio.run(_serve())


async def _serve() -> int:
    lines = asyncio.StreamReader(limit=LINE_NBYTES_MAX)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    start = json.loads(await lines.readline() or "{}")
    if not start:
        return 1
    keep_freed_buffers()
    shard, store = ShardId(start["shard"]), StoreConfig.model_validate(start["store"])
    try:
        driver = new_driver(store, shard, bytes.fromhex(start["secret"]))
        server = ShardServer(driver, store.server(start["token"], start["port"], start["admin_port"]))
        await driver.start()
        address = await server.start()
    except (KVStrataError, OSError) as error:
        _say({"error": str(error)})
        return 1
    _say({"address": address, "admin": server.admin_address, "pid": os.getpid()})
    while line := await lines.readline():
        server.set_topology(_topology(json.loads(line)))
    await server.stop(start["drain_s"])
    await driver.close()
    return 0


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def _topology(document: dict[str, Any]) -> Topology:
    entries = (ShardEntry(ShardId(shard), address) for shard, address in document["shards"])
    return Topology(document["version"], tuple(entries))


if __name__ == "__main__":
    sys.exit(main())
