"""The reader's side of every peer: load the working set, read it in scattered order, verify it.

Runs in the peer's own environment (numpy and the standard library), asked by JSON lines. A peer gets the
treatment our store gets: the same payloads and order, as many blocks in one request, delivered into the
caller's own memory; CPU of this process and of every process it started.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from cli.bench.jsonlines import answer
from cli.bench.oracle import Bytes, buffers, check, payload

_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")


class Store(Protocol):
    """A peer's store whose bytes lie in another process than this one."""

    def start(self, capacity_nbytes: int, memory: Bytes) -> str:
        """Start the peer, given the memory it will read into; what it is, with its version."""
        ...

    def put(self, name: str, block: Bytes) -> None: ...

    def get(self, names: Sequence[str], into: Sequence[Bytes]) -> None:
        """All of them in the peer's best way, into these parts of the memory. Raises when one is missing."""
        ...

    def close(self) -> None: ...


class _Served:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._memory: Bytes = np.empty(0, dtype=np.uint8)
        self._identities: dict[int, list[bytes]] = {}

    def start(self, working_nbytes: int, sizes: int) -> dict[str, Any]:
        self._memory = np.zeros(working_nbytes, dtype=np.uint8)
        return {"what": self._store.start(working_nbytes * sizes, self._memory)}

    def load(self, nbytes: int, keys: Sequence[str]) -> dict[str, Any]:
        self._identities[nbytes] = [bytes.fromhex(key) for key in keys]
        for i, identity in enumerate(self._identities[nbytes]):
            self._store.put(_name(nbytes, i), payload(identity, nbytes))
        return {}

    def read(self, nbytes: int, order: Sequence[int], at_once: int, verify: bool) -> dict[str, Any]:
        into = buffers(self._memory, nbytes, len(order))
        names = [_name(nbytes, i) for i in order]
        cpu, started = _cpu_s(), time.perf_counter()
        for at in range(0, len(order), at_once):
            self._store.get(names[at : at + at_once], into[at : at + at_once])
        wall, used = time.perf_counter() - started, _cpu_s() - cpu
        for i, got in zip(order, into, strict=True) if verify else ():
            check("the peer", names[0], got, payload(self._identities[nbytes][i], nbytes))
        return {"wall_s": wall, "cpu_s": used}


def serve(store: Store) -> None:
    served = _Served(store)
    try:
        answer({"start": served.start, "load": served.load, "read": served.read})
    finally:
        store.close()


def free_port() -> int:
    """A loopback port that was free a moment ago: these peers cannot be asked to choose one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _name(nbytes: int, i: int) -> str:
    return f"{nbytes}:{i}"


def _cpu_s() -> float:
    """Of this process and all below it, as the kernel counts them (in ticks of 10 ms)."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    return sum(used for pid, used in ticks.items() if _is_below(pid, parents)) / _TICKS_A_SECOND


def _is_below(pid: int, parents: dict[int, int]) -> bool:
    while pid:
        if pid == os.getpid():
            return True
        pid = parents.get(pid, 0)
    return False
