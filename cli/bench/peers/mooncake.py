"""Mooncake Store as a peer: master and memory in processes of their own, TCP, zero-copy GET.

Run by the peers' own Python. The reader registers its memory once and gets a batch of objects straight
into it (`batch_get_into`); it gives the cluster no memory, so that every byte crosses TCP.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cli.bench.oracle import Bytes
from cli.bench.peers.serving import free_port, serve

_PACKAGE: Final = "mooncake-transfer-engine-non-cuda"
_START_S: Final = 30.0
_SLACK_NBYTES: Final = 512 << 20  # the allocator's own, and room for nothing to be evicted


class Mooncake:
    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store: Any = None
        self._memory: Bytes | None = None

    def start(self, capacity_nbytes: int, memory: Bytes) -> str:
        rpc, http, metrics = free_port(), free_port(), free_port()
        master, metadata = f"127.0.0.1:{rpc}", f"http://127.0.0.1:{http}/metadata"
        binary = Path(importlib.import_module("mooncake").__path__[0]) / "mooncake_master"
        binary.chmod(0o755)
        self._processes.append(
            subprocess.Popen(
                [
                    str(binary), "--rpc_address=127.0.0.1", f"--rpc_port={rpc}",
                    "--metrics_host=127.0.0.1", f"--metrics_port={metrics}",
                    "--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1",
                    f"--http_metadata_server_port={http}",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
        where = [str(capacity_nbytes + _SLACK_NBYTES), metadata, master]
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "cli.bench.peers.mooncake", "host", *where],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        )
        self._store = _connected(0, metadata, master)
        if self._store.register_buffer(memory.ctypes.data, memory.nbytes) != 0:
            raise RuntimeError("Mooncake did not take the reader's memory")
        self._memory = memory
        return f"Mooncake {importlib.metadata.version(_PACKAGE)}, TCP, batch_get_into"

    def put(self, name: str, block: Bytes) -> None:
        """From registered memory. Asked again while the host process is still joining."""
        assert self._memory is not None
        source = self._memory[: block.nbytes]
        source[:] = block
        deadline = time.monotonic() + _START_S
        while (code := self._store.put_from(name, source.ctypes.data, block.nbytes)) != 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Mooncake's put answers {code}")
            time.sleep(0.1)

    def get(self, names: Sequence[str], into: Sequence[Bytes]) -> None:
        places = [block.ctypes.data for block in into]
        sizes = [block.nbytes for block in into]
        if list(self._store.batch_get_into(list(names), places, sizes)) != sizes:
            raise RuntimeError("Mooncake did not deliver every object")

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)


def _connected(memory_nbytes: int, metadata: str, master: str) -> Any:
    """A client of the cluster that gives it so much memory. Asked again while the master starts."""
    store: Any = importlib.import_module("mooncake.store")
    deadline = time.monotonic() + _START_S
    while True:
        client = store.MooncakeDistributedStore()
        name = f"127.0.0.1:{free_port()}"
        code = client.setup(name, metadata, memory_nbytes, 16 << 20, "tcp", "", master)
        if code == 0:
            return client
        if time.monotonic() > deadline:
            raise RuntimeError(f"Mooncake's setup answers {code}")
        time.sleep(0.2)


def _host(memory_nbytes: str, metadata: str, master: str) -> None:
    """Give the cluster memory until whoever started us is gone."""
    client = _connected(int(memory_nbytes), metadata, master)
    sys.stdin.read()
    client.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["host"]:
        _host(*sys.argv[2:])
    else:
        serve(Mooncake())
