"""The NVMe tier: throughput beside a bare O_DIRECT loop, restart, and what reclaiming writes.

    python -m benchmarks.nvme --directory DIR [--nbytes N] [--total N] [--rounds N] [--json]

DIR is on the disk that is measured (not tmpfs); a few GiB are written there, and removed. Bare is one thread
with pwritev of the same sizes from one page-aligned buffer into a new preallocated file, a fdatasync at the
end, or with preadv of it; the tier's rounds end with a sync, too. Rounds take turns. Write amplification is
bytes written to the disk by those of fresh records, in the steady state: under LRU churn the oldest block
goes, under random churn any. Medians; least and greatest in brackets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli.bench.figures import Moved, Spread, cpu_s
from kvstore.frame import encode_header
from kvstore.memory import keep_freed_buffers
from kvstore.nouns import (
    ROOT_KEY,
    BlockKey,
    BlockMeta,
    Epoch,
    LayoutFingerprint,
    NamespaceId,
    Quality,
    WeightsDigest,
)
from kvstore.tiers.base import Place
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.tier import NvmeTier

RESTART_BLOCKS = 100_000
MIB = 1 << 20


def header(key: int, payload: bytes | memoryview) -> bytes:
    name = BlockKey(key.to_bytes(32, "little"))
    meta = BlockMeta(
        namespace=NamespaceId(bytes(16)),
        key=name,
        parent=ROOT_KEY,
        chain_index=0,
        placement=name,
        epoch=Epoch(1, WeightsDigest(bytes(16))),
        quality=Quality.LOSSLESS,
        fingerprint=LayoutFingerprint(bytes(16)),
    )
    return encode_header(meta, payload)


def frame_in(tier: NvmeTier, header: bytes, payload: bytes) -> memoryview:
    """As a demotion makes it: one copy, into memory the disk takes it from."""
    frame = tier.allocate(len(header) + len(payload))
    frame[: len(header)] = header
    frame[len(header) :] = payload
    return frame


class Bare:
    """What the disk gives to a loop that does nothing else."""

    def __init__(self, path: Path, nbytes: int, count: int) -> None:
        self.path, self.handle = path, -1
        self.buffer = mmap.mmap(-1, nbytes)
        self.buffer[:] = os.urandom(nbytes)
        self.nbytes, self.count = nbytes, count

    async def write(self) -> None:
        self.close()
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.handle, 0, self.nbytes * self.count)
        for i in range(self.count):
            os.pwritev(self.handle, [self.buffer], i * self.nbytes)
        os.fdatasync(self.handle)

    async def read(self) -> None:
        for i in range(self.count):
            os.preadv(self.handle, [self.buffer], i * self.nbytes)

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.path.unlink()


async def throughput(directory: Path, nbytes: int, total: int, rounds: int) -> dict[str, Any]:
    count = total // nbytes
    bare = Bare(directory / "bare", nbytes, count)
    tier = NvmeTier(NvmeConfig((directory / "tier",), max(4 * total, 3 << 30)))
    await tier.recover()
    payload = os.urandom(nbytes)
    frames = [header(key, payload) for key in range(count)]
    generation = 0

    async def write() -> None:
        nonlocal generation
        generation += 1
        for key, head in enumerate(frames):
            tier.discard(Place(key, generation - 1))
            await tier.write(Place(key, generation), frame_in(tier, head, payload))
        await tier.sync()

    async def read(at_once: int) -> None:
        for first in range(0, count, at_once):
            some = range(first, min(count, first + at_once))
            found = await asyncio.gather(*(tier.read(Place(key, generation)) for key in some))
            assert all(frame is not None for frame in found)

    work: dict[str, Callable[[], Awaitable[None]]] = {
        "bare write": bare.write,
        "write": write,
        "bare read": bare.read,
        "read": lambda: read(1),
        "read, 4 at once": lambda: read(4),
    }
    rows: dict[str, list[Moved]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, one in work.items():
            cpu, started = cpu_s(), time.perf_counter()
            await one()
            wall = time.perf_counter() - started
            if i:
                rows[name].append(Moved(total, wall, cpu_s() - cpu))
    await tier.close()
    bare.close()
    return {
        name: {
            "gb_per_s": Spread.of(one.gb_s for one in values),
            "cpu_s_per_gb": Spread.of(one.cpu_s_per_gb for one in values).median,
            "of_bare": Spread.of(
                one.gb_s / bare.gb_s for one, bare in zip(values, beside, strict=True)
            ).median,
        }
        for name, values in rows.items()
        for beside in [rows["bare write" if "write" in name else "bare read"]]
    }


async def restart(directory: Path, rounds: int) -> dict[str, Any]:
    """Opening 100,000 blocks of 4 KiB and adopting each: closed before, and not closed."""
    config = NvmeConfig((directory / "restart",), 4 << 30)
    tier = NvmeTier(config)
    await tier.recover()
    payload = os.urandom(4096)
    for key in range(RESTART_BLOCKS):
        await tier.write(Place(key, 1), frame_in(tier, header(key, payload), payload))
    await tier.sync()
    await tier.close()
    seconds, cpu = [], []
    for _ in range(rounds):
        tier = NvmeTier(config)
        started, before = time.perf_counter(), cpu_s()
        found = await tier.recover()
        for i, block in enumerate(found.blocks):
            tier.adopt(block.record, Place(i, 1))
        seconds.append(time.perf_counter() - started)
        cpu.append(cpu_s() - before)
        assert len(found.blocks) == RESTART_BLOCKS
        await tier.close()
    return {"blocks": RESTART_BLOCKS, "s": Spread.of(seconds), "cpu_s": Spread.of(cpu).median}


async def amplification(directory: Path, live: float, of_disk: bool, lru: bool) -> dict[str, Any]:
    """Segments of 4 MiB with records of 64 KiB, 64 segments: as coarse as 256 MiB with blocks of 4 MiB."""
    config = NvmeConfig((directory / "churn",), 256 * MIB, 4 * MIB)
    tier = NvmeTier(config)
    await tier.recover()
    payload = os.urandom((64 << 10) - 320)
    head = header(0, payload)
    nbytes = len(head) + len(payload)
    budget = config.disk_nbytes if of_disk else tier.room_nbytes()
    blocks = int(live * budget / (nbytes + 64))
    rng = random.Random(1)  # noqa: S311 - which block goes
    held = list(range(blocks))
    written = 0
    base = dict(tier.counters)
    for key in range(blocks * 7):
        if key >= blocks:
            i = key % blocks if lru else rng.randrange(blocks)
            tier.discard(Place(held[i], 1))
            held[i] = key
        await tier.write(Place(key, 1), frame_in(tier, header(key, payload), payload))
        if key % 64 == 0:
            await tier.sync()
        if key == blocks * 3:  # steady from here on
            base = dict(tier.counters)
        written = key
    await tier.sync()
    fresh = tier.counters["fresh_nbytes"] - base["fresh_nbytes"]
    copied = tier.counters["copied_nbytes"] - base.get("copied_nbytes", 0)
    await tier.close()
    return {
        "live": live,
        "of": "disk" if of_disk else "room",
        "churn": "lru" if lru else "random",
        "of_disk": blocks * (nbytes + 64) / config.disk_nbytes,
        "written": written,
        "amplification": (fresh + copied) / fresh,
    }


async def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"nbytes": args.nbytes, "total": args.total, "rounds": args.rounds}
    result["throughput"] = await throughput(directory, args.nbytes, args.total, args.rounds)
    shutil.rmtree(directory / "tier")
    result["restart"] = await restart(directory, args.rounds)
    shutil.rmtree(directory / "restart")
    result["amplification"] = []
    for live, of_disk in ((1.0, False), (0.8, False), (0.8, True)):
        for lru in (True, False):
            result["amplification"].append(await amplification(directory, live, of_disk, lru))
            shutil.rmtree(directory / "churn")
    return result


def show(result: dict[str, Any]) -> None:
    for name, row in result["throughput"].items():
        print(
            f"{name:16} {row['gb_per_s']:5.2f} GB/s  {row['of_bare']:4.2f} of bare"
            f"  {row['cpu_s_per_gb']:5.2f} cpu-s/GB"
        )
    again = result["restart"]
    print(f"restart of {again['blocks']} blocks: {again['s']:.2f} s, {again['cpu_s']:.2f} cpu-s")
    for row in result["amplification"]:
        print(
            f"{row['churn']:6} churn, {row['live']:.0%} of the {row['of']} live "
            f"({row['of_disk']:.2f} of the disk): {row['amplification']:.2f} bytes written a byte"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="an empty one, on the disk to measure")
    parser.add_argument("--nbytes", type=int, default=4 * MIB)
    parser.add_argument("--total", type=int, default=256 * MIB, help="bytes a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_buffers()
    directory: Path = args.directory / "kvstrata-bench"
    directory.mkdir(parents=True)
    try:
        result = asyncio.run(measure(directory, args))
    finally:
        shutil.rmtree(directory)
    print(json.dumps(result, indent=2, default=asdict)) if args.json else show(result)


if __name__ == "__main__":
    main()
