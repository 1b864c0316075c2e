"""Promise 4 of a whole shard: `kill -9` at any moment, and its next life knows what it acknowledged.

A shard process with disks, and a client over gRPC that is told what happened by calls and by a watch. The
client outlives the shard, so what it was told is kept in memory. A version is known to lie on the disks,
synced, when the watch says so: an encoded one when it is COMMITTED (it is made there), any other when it
MOVED: off the host where tiers are exclusive, and else for the first time. After each restart nothing that
was purged or dropped is seen, epochs' numbers stand for the same weights, the namespace is known by the same
id, what is read is exact or exactly what the codec makes of it, and what was on the disks is there.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from kvstore.client import StoreClient
from kvstore.codecs import CODECS
from kvstore.errors import EpochConflict
from kvstore.hashing import digest16
from kvstore.merged_watch import Changed
from kvstore.nouns import (
    DROP,
    ISOLATE,
    BlockKey,
    Change,
    ChangeKind,
    Epoch,
    KVLayout,
    NamespaceSpec,
    Quality,
    ShardId,
    Tier,
)
from kvstore.session import StoreSession
from kvstore.topology import ShardEntry, Topology

SHARD: Final = ShardId("shard-0")
TOKEN: Final = "a token of the tests"
LAYOUT: Final = KVLayout(1, 0, 1, 64, "float32")
SPEC: Final = NamespaceSpec("model", LAYOUT, digest16("tokenizer"))
BLOCKS: Final = 60
PATIENCE_S: Final = 30.0
NEVER: Final = 1 << 60
EPOCHS_MAX: Final = 40

Name = tuple[int, int]
"""A sequence of one block, and an epoch's number."""


def epoch(number: int) -> Epoch:
    return Epoch(number, digest16(f"weights {number}"))


def tokens(i: int) -> list[int]:
    return [i, *range(1, LAYOUT.block_tokens)]


def kv_of(name: Name) -> np.ndarray[Any, Any]:
    shape = (1, 2, LAYOUT.block_tokens, 1, 64)
    return np.random.default_rng(name).standard_normal(shape, dtype="float32")


def encoded(name: Name) -> np.ndarray[Any, Any]:
    codec, exact = CODECS["int8"], kv_of(name)
    made = codec.encode(LAYOUT, memoryview(exact.data).cast("B"))
    assert made is not None
    out = np.empty_like(exact)
    codec.decode(LAYOUT, made, memoryview(out.data).cast("B"))
    return out


class Expected:
    """What the shard acknowledged, and what the watch told."""

    def __init__(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.put: set[Name] = set()
        self.dead: set[Name] = set()  # and not begun to be put again
        self.on_disk: set[tuple[Name, int]] = set()  # with the quality
        self.epochs: set[int] = set()
        self.current = 0
        self.oldest = 0  # that is put to: what is below may be dropped
        self.dropped = 0  # what is below is
        self.names: dict[BlockKey, int] = {}
        self.forgotten: dict[Name, int] = {}  # up to which revision of this life nothing counts

    def told(self, change: Change) -> None:
        if change.key not in self.names or change.epoch < self.oldest:
            return
        version = (self.names[change.key], change.epoch), change.quality
        if change.revision <= self.forgotten.get(version[0], -1):
            return
        if change.kind is ChangeKind.RETIRED:
            self.on_disk.discard(version)
        elif change.kind is ChangeKind.COMMITTED and change.tier == Tier.NVME:
            self.on_disk.add(version)
        elif change.kind is ChangeKind.MOVED:
            if self.exclusive and change.tier != Tier.NVME:
                self.on_disk.discard(version)
            else:
                self.on_disk.add(version)

    def doubt(self, names: set[Name], until: int = NEVER) -> None:
        """They may be gone; what is told of them counts again beyond that revision."""
        self.forgotten.update(dict.fromkeys(names, until))
        self.on_disk = {version for version in self.on_disk if version[0] not in names}


class Life:
    """A running shard, and clients of it."""

    def __init__(self, process: Process, client: StoreClient, admin: StoreClient) -> None:
        self.process, self.client, self.admin = process, client, admin
        self.sessions: dict[int, StoreSession] = {}
        self.watching = asyncio.Event()

    async def session(self, number: int) -> StoreSession:
        if number not in self.sessions:
            opened = await self.client.open(SPEC, epoch(number), min_quality=Quality.INT8)
            self.sessions[number] = opened
        return self.sessions[number]

    async def follow(self, session: StoreSession, expected: Expected) -> None:
        async with self.client.watch([session.namespace], for_s=PATIENCE_S) as watch:
            async for event in watch:
                if not isinstance(event, Changed):
                    continue
                for change in event.changes:
                    expected.told(change)
                self.watching.set()


@asynccontextmanager
async def life(store: dict[str, Any]) -> AsyncIterator[Life]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvstore.shard_process", stdin=PIPE, stdout=PIPE, start_new_session=True
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        ports = {"port": 0, "admin_port": 0, "drain_s": 0}
        start = {
            "shard": SHARD,
            "store": store,
            "secret": b"a secret of the tests".hex(),
            "token": TOKEN,
            **ports,
        }
        process.stdin.write(json.dumps(start).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            said = json.loads(await process.stdout.readline())
        assert "error" not in said, said["error"]
        at, admin_at = (Topology(1, (ShardEntry(SHARD, said[k]),)) for k in ("address", "admin"))
        async with (
            await StoreClient.connect(at, token=TOKEN, shared_memory=False) as client,
            await StoreClient.connect(admin_at, token=TOKEN, shared_memory=False) as admin,
        ):
            yield Life(process, client, admin)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def check(one: Life, expected: Expected) -> None:
    if expected.epochs:
        namespace = (await one.session(max(expected.epochs))).namespace
        known = await one.admin.namespaces()
        assert [space.id for space in known[SHARD]] == [namespace]
    shown = (await one.client.epochs("model"))[SHARD] if expected.epochs else None
    for number in expected.epochs:
        assert shown is not None
        assert epoch(number) in shown.registered, f"epoch {number} is not bound any more"
        with pytest.raises(EpochConflict):
            await one.client.register_epoch("model", Epoch(number, digest16("others")))
    if shown is not None:
        assert shown.current >= expected.current
        assert shown.oldest >= expected.dropped
    on_disk = {name for name, _ in expected.on_disk}
    for name in sorted(expected.put):
        hit = await (await one.session(name[1])).get(tokens(name[0]))
        assert not hit.n_tokens or name not in expected.dead, f"{name} was purged or dropped, and is seen"
        assert hit.n_tokens or name not in on_disk, f"{name} was on the disks, and is lost: {hit.misses}"
        if hit.n_tokens:
            assert np.array_equal(hit.kv, kv_of(name)) or np.array_equal(hit.kv, encoded(name))


class Worker:
    """Does random things, each acknowledged or not when the shard is killed."""

    def __init__(self, one: Life, expected: Expected, rng: random.Random) -> None:
        self.one, self.expected, self.rng = one, expected, rng

    def deed(self) -> Callable[[], Awaitable[None]]:
        deeds = (self.put, self.read, self.purge, self.register, self.advance)
        return self.rng.choices(deeds, (70, 15, 6, 4, 3))[0]

    def number(self) -> int:
        able = [number for number in self.expected.epochs if number >= self.expected.oldest]
        return self.rng.choice(able)

    async def register(self) -> None:
        number = 1 + max(self.expected.epochs, default=0)
        if number < EPOCHS_MAX:
            await self.one.session(number)
            await self.one.client.register_epoch("model", epoch(number))
            self.expected.epochs.add(number)

    async def put(self) -> None:
        name = self.rng.randrange(BLOCKS), self.number()
        session = await self.one.session(name[1])
        self.expected.names[session.keys(tokens(name[0]))[0]] = name[0]
        self.expected.put.add(name)
        self.expected.dead.discard(name)
        await session.put(tokens(name[0]), kv_of(name))

    async def read(self) -> None:
        await (await self.one.session(self.number())).get(tokens(self.rng.randrange(BLOCKS)))

    async def purge(self) -> None:
        session = await self.one.session(self.number())
        some = self.rng.sample(range(BLOCKS), 8)
        keys = None if self.rng.random() < 0.2 else [session.keys(tokens(i))[0] for i in some]
        number = self.rng.choice((None, self.number())) if keys is None else None
        dead = {(i, e) for i, e in self.expected.put if (keys is None or i in some) and number in (None, e)}
        self.expected.doubt(dead)
        done = await self.one.admin.purge(session.namespace, keys=keys, epoch=number)
        self.expected.doubt(dead, done[SHARD].revision.counter)
        self.expected.dead |= dead

    async def advance(self) -> None:
        number = self.rng.choice([n for n in self.expected.epochs if n >= self.expected.current])
        drops = self.rng.random() < 0.5
        dropped = {name for name in self.expected.put if drops and name[1] < number}
        if drops:
            self.expected.oldest = max(self.expected.oldest, number)  # nobody puts below any more
        self.expected.doubt(dropped)
        await self.one.admin.advance_epoch("model", number, DROP if drops else ISOLATE)
        self.expected.dropped = max(self.expected.dropped, number if drops else 0)
        self.expected.current = max(self.expected.current, number)
        self.expected.dead |= dropped


async def live(store: dict[str, Any], expected: Expected, rng: random.Random) -> None:
    """One life: checked, worked on, killed in the midst of something."""
    async with life(store) as one:
        await check(one, expected)
        expected.forgotten.clear()
        worker = Worker(one, expected, rng)
        await worker.register()
        following = asyncio.create_task(one.follow(await one.session(max(expected.epochs)), expected))
        try:
            await asyncio.wait_for(one.watching.wait(), PATIENCE_S)
            for _ in range(rng.choice((1, 10, 60, 150))):
                await worker.deed()()
            last = asyncio.ensure_future(worker.deed()())
            for _ in range(rng.choice((0, 1, 5, 20))):
                await asyncio.sleep(0)
            one.process.kill()
            await one.process.wait()
            last.cancel()  # it may wait long for a shard that is gone: acknowledged or never
            await asyncio.gather(last, return_exceptions=True)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def kill_loop(folder: Path, seed: int, rounds: int) -> Expected:
    rng = random.Random(seed)
    nvme = {
        "directories": [str(folder / f"disk-{i}") for i in range(rng.choice((1, 2)))],
        "disk_nbytes": 64 << 20,
        "segment_nbytes": rng.choice((1 << 18, 1 << 20)),
        "write": rng.choice(("write_through", "write_through", "write_through_selective", "write_back")),
        "admission": "always",
        "codec": rng.choice(("lossless", "int8")),
        "exclusive": rng.random() < 0.3,
        "direct": rng.random() < 0.7,
    }
    store = {"capacity_nbytes": 1 << 20, "reap_interval_s": 0.05, "nvme": nvme}
    expected = Expected(bool(nvme["exclusive"]))
    for number in range(rounds):
        try:
            await live(store, expected, rng)
        except Exception as error:
            error.add_note(f"seed {seed}, round {number}, {nvme}")
            raise
    async with life(store) as one:
        await check(one, expected)
    return expected


async def test_a_killed_shard_knows_what_it_acknowledged(tmp_path: Path) -> None:
    expected = await kill_loop(tmp_path, 2, 2)
    assert expected.on_disk


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
async def test_shards_that_are_killed_again_and_again(seed: int, tmp_path: Path) -> None:
    await kill_loop(tmp_path, seed, 5)
