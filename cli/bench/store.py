"""One run of `kvstrata bench store`: everything of it in the same rounds, so that noise meets everyone alike.

In a round, each size of block in turn: a memcpy, raw TCP, our reads and writes over each transport, each
peer; who comes first moves on with every round. The first round warms up and is thrown away; it is also
the one that verifies the peers' bytes (ours are verified in every round). Then, once: commits that must be
seen, and the core alone, which needs the machine to itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from cli.bench import limits
from cli.bench.blocks import OurBlocks, Sessions
from cli.bench.control import Control
from cli.bench.figures import BYTES_ALONE, Moved, Samples, Spread
from cli.bench.jsonlines import Child, ChildFailed
from cli.bench.oracle import Bytes, buffers, check
from cli.bench.peers.start import PEERS, Peer
from cli.bench.plan import KIB, SIZES, TIMEOUT_S, Plan
from kvstore.client import StoreClient
from kvstore.nouns import ShardId
from kvstore.topology import ShardEntry, Topology
from kvstore.upkeep import SWEEP_SLOTS

GRPC: Final = "grpc"
SHM: Final = "shm"
CORE_MATCH64_VERSIONS: Final = 65_536
_CORE_S: Final = 600.0

Corrupt = Literal["stored", "delivered"]
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Result:
    plan: Plan
    samples: Samples = field(default_factory=Samples)
    peers: dict[str, str] = field(default_factory=dict)  # name -> what it is
    absent: dict[str, str] = field(default_factory=dict)  # transport or peer -> why
    notes: list[str] = field(default_factory=list)
    misses: int = 0
    core_match64_us: Spread = field(default_factory=lambda: Spread(0, 0, 0))
    epoch: dict[str, Any] = field(default_factory=dict)


class StoreBench:
    """Belongs to one event loop. `corrupt` breaks a byte on purpose: the bench must then fail."""

    def __init__(self, plan: Plan, progress: Progress, corrupt: Corrupt | None = None) -> None:
        self._plan = plan
        self._progress = progress
        self._corrupt = corrupt
        self._result = Result(plan)
        self._transports: dict[str, Sessions] = {}
        self._peers: dict[str, Peer] = {}
        self._memory: Bytes = np.zeros(plan.working_nbytes, dtype=np.uint8)
        self._closing = contextlib.AsyncExitStack()

    async def run(self, peers_folder: Path | None) -> Result:
        """Peers take part if there is a folder for them.

        Raises WrongBytes for a byte that is not what was stored, ChildFailed when a process breaks off.
        """
        async with self._closing:
            await self._start(peers_folder)
            for round_number in range(self._plan.rounds + 1):
                if round_number == 1:
                    self._result.samples.clear()
                await self._round(round_number)
            self._progress("commits that must be seen", 0, 1)
            self._result.misses = await self._control.read_your_writes()
            if SHM in self._transports:
                detours = self._transports[SHM].client.counters["shm:asked_shard"]
                self._result.notes.append(f"{detours} blocks of the shm rows were read over gRPC")
        self._core_alone()
        return self._result

    # -- setting up --------------------------------------------------------------------------------

    async def _start(self, peers_folder: Path | None) -> None:
        plan = self._plan
        resident = sum(plan.blocks(nbytes) * (nbytes + KIB) for nbytes in SIZES)
        capacity = resident + 4 * plan.request_nbytes
        slots = capacity // SIZES[0] + 2 * plan.pairs + 4 * KIB
        self._shard = self._closing.enter_context(Child.of_module("cli.bench.shard_process"))
        token = secrets.token_hex(16)  # the arena is shared with those who know it
        started = self._shard.ask("start", TIMEOUT_S, capacity_nbytes=capacity, slots=slots, token=token)
        self._ours = OurBlocks(plan, self._shard)
        self._tcp = limits.RawTcp()
        self._closing.callback(self._tcp.close)
        await self._connect(Topology(1, (ShardEntry(ShardId("bench"), started["address"]),)), token)
        self._start_peers(peers_folder)
        for done, nbytes in enumerate(SIZES):
            self._progress("loading", done, len(SIZES))
            await self._ours.load(self._transports[GRPC].by_size[nbytes], nbytes)
            keys, _ = self._ours.blocks(nbytes)
            self._tcp.load(nbytes, keys)
            for name, peer in list(self._peers.items()):
                self._or_absent(name, functools.partial(peer.load, nbytes, keys))
        if self._corrupt == "stored":
            self._shard.ask("flip", TIMEOUT_S)  # of what was stored first
        self._control = await Control.open(plan, *self._clients)

    async def _connect(self, topology: Topology, token: str) -> None:
        async def client(**options: Any) -> StoreClient:
            made = await StoreClient.connect(topology, token=token, **options)
            return await self._closing.enter_async_context(made)

        knows_shm = "shared_memory" in inspect.signature(StoreClient.connect).parameters
        alone = {"shared_memory": False} if knows_shm else {}
        writer, reader = await client(**alone), await client(**alone)
        self._transports[GRPC] = await Sessions.open(reader)
        self._clients = writer, reader
        if not knows_shm:
            self._result.absent[SHM] = "this version of kvstrata has no shared-memory transport"
            return
        near = await Sessions.open(await client(shared_memory=True))
        if near.client.counters["shm:attached"]:
            self._transports[SHM] = near
        else:
            self._result.absent[SHM] = f"the shard's memory could not be mapped: {dict(near.client.counters)}"

    def _start_peers(self, folder: Path | None) -> None:
        for done, name in enumerate(PEERS):
            if folder is None:
                self._result.absent[name] = "left out, as asked"
                continue
            self._progress(f"starting {name}", done, len(PEERS))
            try:
                peer = Peer(name, folder, self._plan)
            except ChildFailed as error:
                self._result.absent[name] = str(error)
                continue
            self._closing.callback(peer.close)
            self._peers[name] = peer
            self._result.peers[name] = peer.what

    def _or_absent(self, name: str, work: Callable[[], None]) -> None:
        """A peer that breaks off is absent from here on, with what it said; the bench goes on."""
        try:
            work()
        except ChildFailed as error:
            del self._peers[name], self._result.peers[name]
            self._result.absent[name] = str(error)

    # -- measuring ---------------------------------------------------------------------------------

    async def _round(self, number: int) -> None:
        await self._ours.keep()
        await self._control.keep()
        samples, name = self._result.samples, f"round {number} of {self._plan.rounds}"
        for done, nbytes in enumerate(SIZES):
            self._progress(name, done, len(SIZES) + 1)
            work = self._work(nbytes, first_round=number == 0)
            turn = number % len(work)
            for measure in work[turn:] + work[:turn]:
                await measure()
        self._progress(name, len(SIZES), len(SIZES) + 1)
        samples.note("match64_ms", await self._control.match64_ms())
        samples.note("match_keys_per_s", await self._control.match_keys_per_s())

    def _work(self, nbytes: int, first_round: bool) -> list[Callable[[], Awaitable[None]]]:
        """All measurements of one size; each leaves its figure, or raises."""
        order = self._ours.order(nbytes)
        _, expected = self._ours.blocks(nbytes)
        samples = self._result.samples

        def keep(what: str, who: str, moved: Moved) -> None:
            samples.add((what, who, nbytes), moved)

        def read_right(who: str, moved: Moved, into: list[Bytes]) -> None:
            if self._corrupt == "delivered" and who in self._transports:
                into[-1][-1] ^= 1
            for i, got in zip(order, into, strict=True):
                check(who, f"{i} of {nbytes} bytes", got, expected[i])
            keep("read", who, moved)

        async def memcpy() -> None:
            into = buffers(self._memory, nbytes, len(order))
            read_right("memcpy", limits.copied(expected, order, into), into)

        async def tcp() -> None:
            into = buffers(self._memory, nbytes, len(order))
            read_right("tcp", self._tcp.moved(nbytes, order, into), into)

        async def read(transport: str) -> None:
            into = buffers(self._memory, nbytes, len(order))
            session = self._transports[transport].by_size[nbytes]
            whole, bytes_alone = await self._ours.read(session, nbytes, order, into)
            read_right(transport, whole, into)
            keep(BYTES_ALONE, transport, bytes_alone)

        async def write(transport: str) -> None:
            into = buffers(self._memory, nbytes, self._plan.request_blocks(nbytes))
            session = self._transports[transport].by_size[nbytes]
            keep("write", transport, await self._ours.write(session, nbytes, into))

        async def peer(name: str) -> None:
            if name in self._peers:
                self._or_absent(
                    name, lambda: keep("read", name, self._peers[name].read(nbytes, order, first_round))
                )

        ours = [functools.partial(of, transport) for transport in self._transports for of in (read, write)]
        return [memcpy, tcp, *ours, *(functools.partial(peer, name) for name in PEERS)]

    def _core_alone(self) -> None:
        plan, result = self._plan, self._result
        versions = min(CORE_MATCH64_VERSIONS, plan.versions)
        steps: list[tuple[str, str, dict[str, int]]] = [
            ("match", "match64", {"versions": versions, "matches": plan.probes}),
            (
                "epoch",
                "epoch",
                {"versions": plan.versions, "probes": plan.probes, "sweep_slots": SWEEP_SLOTS},
            ),
            ("flush", "flush", {"versions": plan.versions, "sweep_slots": SWEEP_SLOTS}),
        ]
        answers: dict[str, dict[str, Any]] = {}
        for done, (name, asked, fields) in enumerate(steps):
            self._progress(f"the core alone: {name}", done, len(steps))
            with Child.of_module("cli.bench.core_process") as child:
                answers[asked] = child.ask(asked, _CORE_S, **fields)
        result.core_match64_us = Spread(**answers["match64"])
        result.epoch = answers["epoch"] | answers["flush"]
