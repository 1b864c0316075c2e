"""N shards as processes of this machine: started together, brought back when one dies, drained at the end.

A shard that comes back listens where it did, under another incarnation: its clients find it again, and what
it held is a miss. One that dies again and again waits longer each time, `RESTART_S` at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, Unavailable
from kvstore.store_file import ShardPlace

START_S: Final = 60.0
RECOVERY_S: Final = 900.0  # with disks: about 0.1 s for each 1,000 blocks that are found again
END_S: Final = 5.0  # beyond the drain, before it is killed
RESTART_S: Final = (0.2, 10.0)
STEADY_S: Final = 30.0  # alive for so long: the next death is a first one again

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ProcessesStart:
    store: StoreConfig
    secret: bytes = field(repr=False)
    token: str = field(repr=False)
    drain_s: float
    advertise: str | None = None  # the host that clients are told, where it is not the one listened on


class ShardProcesses:
    """`changed` is called with all places whenever one is another: at the start, and after a restart."""

    def __init__(
        self, start: ProcessesStart, told: Told, changed: Callable[[list[ShardPlace]], None]
    ) -> None:
        self._start = start
        self._told = told
        self._changed = changed
        self._processes: dict[int, Process] = {}
        self._places: dict[int, ShardPlace] = {}
        self._version = 0
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """All up, or all ended and the first reason raised: ConfigError or Unavailable."""
        count = self._start.store.shards
        try:
            async with asyncio.TaskGroup() as group:
                for i in range(count):
                    group.create_task(self._bring_up(i))
        except BaseExceptionGroup as errors:
            self.kill()
            raise errors.exceptions[0] from None
        except BaseException:
            self.kill()
            raise
        self._announce()
        self._keepers = [asyncio.create_task(self._keep(i), name=f"keep-{i}") for i in range(count)]

    async def drain(self) -> None:
        """Each says NOT_SERVING, lets its calls finish within the drain, and ends, or is killed."""
        await self._stop_keepers()
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        try:
            async with asyncio.timeout(self._start.drain_s + END_S):
                await asyncio.gather(*(process.wait() for process in self._processes.values()))
        except TimeoutError:
            self._told("some shards did not end in time: killed")
        finally:
            self.kill()

    def kill(self) -> None:
        """At once. Nothing of theirs outlives it."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                if process.returncode is None:
                    process.kill()

    async def _stop_keepers(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, i: int) -> None:
        """Bring the shard back whenever it dies."""
        loop, wait_s = asyncio.get_running_loop(), RESTART_S[0]
        while True:
            began = loop.time()
            code = await self._processes[i].wait()
            if loop.time() - began > STEADY_S:
                wait_s = RESTART_S[0]
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            self._told(f"shard-{i} {how}: starting it again; what it held in memory is gone")
            await asyncio.sleep(wait_s)
            wait_s = min(RESTART_S[1], 2 * wait_s)
            try:
                await self._bring_up(i)
            except (ConfigError, Unavailable) as error:
                self._told(f"shard-{i} does not start: {error}")
                continue
            self._announce()
            self._told(f"shard-{i} is back")

    async def _bring_up(self, i: int) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvstore.shard_process", stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        self._processes[i] = process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(self._told_at_start(i)).encode() + b"\n")
        try:
            async with asyncio.timeout(limit_s := START_S if self._start.store.nvme is None else RECOVERY_S):
                line = await process.stdout.readline()
        except TimeoutError:
            process.kill()
            raise Unavailable(f"shard-{i} did not start within {limit_s:.0f} s: look at its log") from None
        answer: dict[str, Any] = json.loads(line or '{"error": "it ended at once: its log says why"}')
        if "error" in answer:
            raise ConfigError(f"shard-{i}: {answer['error']}")
        address = self._advertised(answer["address"])
        self._places[i] = ShardPlace(f"shard-{i}", address, answer["admin"], answer["pid"])

    def _told_at_start(self, i: int) -> dict[str, Any]:
        """Where it listened before, if it did; else where the settings say."""
        start, store, before = self._start, self._start.store, self._places.get(i)
        port = store.port and store.port + i
        admin_port = store.admin_port and store.admin_port + i
        if before is not None:
            port, admin_port = (int(a.rpartition(":")[2]) for a in (before.address, before.admin))
        return {
            "shard": f"shard-{i}",
            "store": _plain(store),
            "secret": start.secret.hex(),
            "token": start.token,
            "port": port,
            "admin_port": admin_port,
            "drain_s": start.drain_s,
        }

    def _advertised(self, address: str) -> str:
        if self._start.advertise is None:
            return address
        return f"{self._start.advertise}:{address.rpartition(':')[2]}"

    def _announce(self) -> None:
        """All shards hear where all are, so that clients may ask any of them."""
        places = [self._places[i] for i in sorted(self._places)]
        self._changed(places)
        self._version += 1
        shards = [(place.shard, place.address) for place in places]
        line = json.dumps({"version": self._version, "shards": shards}).encode() + b"\n"
        for process in self._processes.values():
            if process.returncode is None and process.stdin is not None:
                process.stdin.write(line)


def _plain(store: StoreConfig) -> dict[str, Any]:
    """As JSON, tenants' tokens included: it goes to the shard's standard input and nowhere else."""
    document = store.model_dump(mode="json", exclude={"secret"})  # which is handed over by itself
    for name, tenant in store.tenants.items():
        if tenant.token is not None:
            document["tenants"][name]["token"] = tenant.token.get_secret_value()
    return document
