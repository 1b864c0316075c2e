"""What no store on this machine can beat: copying the same blocks in memory, and moving them over raw TCP.

Both deliver into the same buffers, in the same scattered order, as the stores do. Neither finds, checks
or pins anything.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence

import numpy as np

from cli.bench.figures import Moved, cpu_s
from cli.bench.jsonlines import Child
from cli.bench.oracle import Bytes
from cli.bench.plan import TIMEOUT_S
from cli.bench.tcp_source import HEADER, receive_into


def copied(blocks: Sequence[Bytes], order: Sequence[int], into: Sequence[Bytes]) -> Moved:
    """One memcpy a block, in one thread."""
    pairs = [(into[to], blocks[at]) for to, at in enumerate(order)]
    cpu, started = cpu_s(), time.perf_counter()
    for to, source in pairs:
        np.copyto(to, source)
    wall = time.perf_counter() - started
    return Moved(sum(block.nbytes for block in into), wall, cpu_s() - cpu)


class RawTcp:
    """One connection to a process that holds the same blocks."""

    def __init__(self) -> None:
        self._child = Child.of_module("cli.bench.tcp_source")
        port = self._child.ask("listen", TIMEOUT_S)["port"]
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)

    def load(self, nbytes: int, keys: Sequence[bytes]) -> None:
        self._child.ask("load", TIMEOUT_S, nbytes=nbytes, keys=[key.hex() for key in keys])

    def moved(self, nbytes: int, order: Sequence[int], into: Sequence[Bytes]) -> Moved:
        asked = HEADER.pack(nbytes, len(order)) + struct.pack(f"<{len(order)}I", *order)
        cpu, started = self._cpu_s(), time.perf_counter()
        self._socket.sendall(asked)
        for buffer in into:
            if not receive_into(self._socket, buffer.data):
                raise ConnectionError("the raw TCP source broke off")
        wall = time.perf_counter() - started
        return Moved(nbytes * len(order), wall, self._cpu_s() - cpu)

    def close(self) -> None:
        self._socket.close()
        self._child.close()

    def _cpu_s(self) -> float:
        return cpu_s() + float(self._child.ask("cpu", TIMEOUT_S)["cpu_s"])
