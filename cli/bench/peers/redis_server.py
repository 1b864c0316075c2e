"""Redis as a peer: one server over loopback TCP, read by MGETs of about 1 MiB.

Run by the peers' own Python; argv[1] is the server's binary. Larger MGETs were tried and are slower, up to
three times. The reply is parsed by hiredis and copied into the caller's memory.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cli.bench.oracle import Bytes
from cli.bench.peers.serving import free_port, serve

_START_S: Final = 20.0
_MGET_NBYTES: Final = 1 << 20


class Redis:
    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="kvstrata-bench-")
        self._client: Any = None

    def start(self, capacity_nbytes: int, memory: Bytes) -> str:
        redis: Any = importlib.import_module("redis")
        port = free_port()
        self._server = subprocess.Popen(
            [self._binary, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"],
            cwd=self._folder.name,
            stdout=subprocess.DEVNULL,
        )
        self._client = redis.Redis("127.0.0.1", port)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                version = self._client.info("server")["redis_version"]
                return f"Redis {version}, TCP, MGET, redis-py {redis.__version__} with hiredis"
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def put(self, name: str, block: Bytes) -> None:
        self._client.set(name, block.data)

    def get(self, names: Sequence[str], into: Sequence[Bytes]) -> None:
        at_once = max(1, _MGET_NBYTES // into[0].nbytes)
        for at in range(0, len(names), at_once):
            values = self._client.mget(names[at : at + at_once])
            for value, buffer in zip(values, into[at : at + at_once], strict=True):
                if value is None:
                    raise RuntimeError("Redis has lost a block")
                np.copyto(buffer, np.frombuffer(value, dtype=np.uint8))

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(5)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait(5)
        self._folder.cleanup()


if __name__ == "__main__":
    serve(Redis(sys.argv[1]))
