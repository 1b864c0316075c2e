"""The store of these tests: one shard in a process that can be stopped, killed, filled and brought back."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final

from cli.bench.jsonlines import Child

START_S: Final = 30.0
CALL_S: Final = 15.0


class Store:
    """`capacity_nbytes` of memory for blocks. It comes back on the port it had, remembering nothing."""

    def __init__(self, folder: Path, capacity_nbytes: int = 64 << 20, shared_memory: bool = True) -> None:
        self.token_file = folder / "token"
        self.token = secrets.token_urlsafe(16)
        with os.fdopen(os.open(self.token_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(self.token)
        self._settings = {"capacity_nbytes": capacity_nbytes, "shared_memory": shared_memory}
        self.maps_memory = shared_memory
        self._port = 0
        self.start()

    def start(self) -> None:
        self._child = Child.of_module("tests.vllm.store_child")
        asked = self._settings | {"port": self._port, "token": self.token}
        started = self._child.ask("start", START_S, **asked)
        self.address: str = started["address"]
        self.admin: str = started["admin"]
        self._pid: int | None = started["pid"]
        self._port = int(self.address.rpartition(":")[2])

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        self._pid = None
        self._child.close()

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, what: signal.Signals) -> None:
        assert self._pid is not None, "the store was killed"
        os.kill(self._pid, what)

    def flip(self) -> None:
        """Break a byte of a block that begins a chain."""
        assert self._child.ask("flip", CALL_S)["key"] is not None

    def arm(self, point: str, action: str, *, after: int = 0, times: int = 1) -> None:
        self._child.ask("arm", CALL_S, point=point, action=action, after=after, times=times)

    def disarm(self, point: str) -> None:
        self._child.ask("disarm", CALL_S, point=point)

    def status(self) -> dict[str, Any]:
        return self._child.ask("status", CALL_S)

    def until(self, holds: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 20.0) -> None:
        """Ask for the status until it is so: what engines give back goes by threads of theirs."""
        deadline = monotonic() + timeout_s
        while not holds(status := self.status()):
            assert monotonic() < deadline, f"not within {timeout_s} s: {what}; {status}"

    def until_versions(self, count: int) -> None:
        """Engines save beside their steps: wait until so many blocks are here."""
        self.until(lambda status: bool(status["versions"] >= count), f"{count} blocks stored")

    def until_idle(self) -> None:
        """No lease, nothing being written, nothing without an owner."""
        self.until(lambda s: not (s["leases"] or s["staged_nbytes"] or s["ownerless_nbytes"]), "idle")

    def close(self) -> None:
        if self._pid is not None:
            self.resume()
            self._child.close()


@contextmanager
def store(folder: Path, capacity_nbytes: int = 64 << 20, shared_memory: bool = True) -> Iterator[Store]:
    running = Store(folder, capacity_nbytes, shared_memory)
    try:
        yield running
    finally:
        running.close()
