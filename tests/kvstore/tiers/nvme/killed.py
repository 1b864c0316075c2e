"""A process that works on a store until it is killed, and the file that says what it was told is there.

The expected-state file is appended to with one unbuffered write a line, so it survives the process (not the
machine): before something is begun, and after it was acknowledged. Each life reads it, checks what it
recovers against it, and goes on. A violation ends the process with its message on the pipe.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from kvstore.tiers.base import Place
from kvstore.tiers.durable import PurgeNote
from kvstore.tiers.nvme import journal
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block, key_of, namespace_of, verified
from tests.kvstore.tiers.nvme.history import adopt_all, blocks_of

SIZES = (0, 300, 3_776, 9_000, 40_000)


def block(key: int) -> Block:
    return Block(key, 1 + key % 2, key % 3 // 2, nbytes=SIZES[key % len(SIZES)])


class Expected:
    """What each key must be: "kept", "maybe" or "dead"."""

    def __init__(self, path: Path) -> None:
        self.state: dict[int, str] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            state, keys = json.loads(line)
            self.state.update(dict.fromkeys(keys, state))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(self, state: str, keys: Iterable[int]) -> None:
        told = list(keys)
        self.state.update(dict.fromkeys(told, state))
        os.write(self._file, json.dumps([state, told]).encode() + b"\n")

    def check(self, found: set[int]) -> None:
        dead = {key for key in found if self.state.get(key, "dead") == "dead"}
        lost = {key for key, state in self.state.items() if state == "kept"} - found
        assert not dead, f"purged or never written, and there: {sorted(dead)}"
        assert not lost, f"kept, and lost: {sorted(lost)}"


async def live(settings: NvmeConfig, expected: Expected, rng: random.Random, progress: Connection) -> None:
    tier = NvmeTier(settings)
    found = await tier.recover()
    keys = [block.key for block in blocks_of(found)]
    expected.check(set(keys))
    await adopt_all(tier, found)
    expected.tell("kept", keys)
    held = dict(zip(keys, range(len(keys)), strict=True))  # key -> slot
    slots, fresh = len(keys), set[int]()
    progress.send("recovered")

    def evict() -> None:
        one = rng.choice(list(held))
        expected.tell("maybe", [one])
        fresh.discard(one)
        tier.discard(Place(held.pop(one), 1))

    def is_crowded() -> bool:
        return bool(held) and tier.nbytes() > 0.9 * tier.room_nbytes()

    while is_crowded():  # the last life may have had a larger disk
        evict()
    while True:
        key = rng.randrange(300)
        step = rng.random()
        if step < 0.7 and key not in held:
            expected.tell("maybe", [key])
            held[key], slots = slots, slots + 1
            await tier.write(Place(held[key], 1), block(key).frame())
            fresh.add(key)
        elif step < 0.8:
            await tier.sync()
            expected.tell("kept", fresh)
            fresh.clear()
        elif step < 0.82:
            some = {key, *rng.sample(range(300), 20)}
            mine = [one for one in some if block(one).namespace == 0]
            expected.tell("maybe", [one for one in mine if expected.state.get(one, "dead") != "dead"])
            await tier.note(PurgeNote(namespace_of(0), tuple(map(key_of, mine)), None))
            expected.tell("dead", mine)
            for one in mine:
                fresh.discard(one)
                if one in held:
                    tier.discard(Place(held.pop(one), 1))
        elif step < 0.9 and held:
            one = rng.choice(list(held))
            frame = await tier.read(Place(held[one], 1))
            assert frame is not None
            assert verified(frame) == block(one)
        if step > 0.97 and held:
            evict()
        while is_crowded():
            evict()
        progress.send("step")


def work(directories: list[str], expected: str, seed: int, progress: Connection) -> None:
    rng = random.Random(seed)
    journal.GROWTH_NBYTES = rng.choice((0, 2_000))
    segment_nbytes = rng.choice((1 << 17, 1 << 18))
    settings = NvmeConfig(
        tuple(map(Path, directories)),
        len(directories) * 10 * segment_nbytes,
        segment_nbytes,
        batch_nbytes=rng.choice((1 << 14, 1 << 17)),
        direct=rng.random() < 0.7,
    )
    try:
        asyncio.run(live(settings, Expected(Path(expected)), rng, progress))
    except BaseException as error:
        progress.send(f"{type(error).__name__}: {error}")
        raise
