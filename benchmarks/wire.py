"""How fast blocks cross the wire: a shard in one process, a reader and writer in another, over loopback gRPC.

    python -m benchmarks.wire [--rounds N] [--blocks N] [--json]

Every byte read is verified. Beside it, in the same run: a memcpy of as many bytes. Prints medians over the
rounds; CPU seconds are of both processes together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import numpy as np

from benchmarks.serving import Pipe, apart, serve
from cli.bench.figures import Spread, cpu_s
from kvstore.answers import PublishBlock, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.hashing import KeyChain
from kvstore.memory import keep_freed_buffers
from kvstore.nouns import Epoch, KVLayout, NamespaceSpec, Quality, ShardId, WeightsDigest
from kvstore.session import StoreSession
from kvstore.topology import ShardEntry, Topology

LAYOUT = KVLayout(30, 0, 3, 64, "float32")  # SmolLM2-135M: 1.47 MB a block
SPEC = NamespaceSpec("bench", LAYOUT, bytes(16))
EPOCH = Epoch(1, WeightsDigest(bytes(16)))
TIMEOUT_S = 60.0
ARENA_NBYTES = 4 << 30


class Bench:
    def __init__(self, session: StoreSession, pipe: Pipe, blocks: int) -> None:
        self.session = session
        self.pipe = pipe
        self.blocks = blocks
        rng = np.random.default_rng(0)
        self.payloads = [
            rng.integers(0, 256, LAYOUT.block_nbytes, dtype=np.uint8).data for _ in range(blocks)
        ]
        self.gb = blocks * LAYOUT.block_nbytes / 1e9

    def chain(self, seed: int) -> KeyChain:
        made = KeyChain(self.session.namespace, LAYOUT.block_tokens)
        made.extend(range(seed, seed + self.blocks * LAYOUT.block_tokens))
        return made

    def both_cpu_s(self) -> float:
        self.pipe.send(True)
        return float(self.pipe.recv()) + cpu_s()

    async def timed(self, work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
        """GB/s and CPU seconds per GB."""
        cpu, started = self.both_cpu_s(), time.perf_counter()
        await work()
        wall = time.perf_counter() - started
        return self.gb / wall, (self.both_cpu_s() - cpu) / self.gb

    async def publish(self, made: KeyChain) -> None:
        blocks = [
            PublishBlock(key, made.parent(i), i, made.placement(i), self.payloads[i])
            for i, key in enumerate(made.keys)
        ]
        done = await self.session.publish(
            blocks, quality=Quality.LOSSLESS, owner="bench", pin_for_s=None, timeout_s=TIMEOUT_S
        )
        assert len(done.blocks) == self.blocks

    async def read(self, made: KeyChain) -> None:
        found = await self.session.match(made.keys, owner="bench", lease_s=60, timeout_s=TIMEOUT_S)
        verified = 0
        async for item in self.session.read(found.blocks, timeout_s=TIMEOUT_S):
            verified += isinstance(item, VerifiedBlock)
        assert verified == self.blocks
        await self.session.release(found.leases)

    async def match_ms(self, made: KeyChain) -> float:
        started = time.perf_counter()
        found = await self.session.match(made.keys[:64], owner="bench", lease_s=60, timeout_s=TIMEOUT_S)
        taken = (time.perf_counter() - started) * 1000
        await self.session.release(found.leases)
        return taken

    def memcpy_gb_s(self) -> float:
        started = time.perf_counter()
        for payload in self.payloads:
            bytearray(payload)
        return self.gb / (time.perf_counter() - started)


async def run(address: str, pipe: Pipe, rounds: int, blocks: int) -> dict[str, Spread]:
    topology = Topology(1, (ShardEntry(ShardId("bench"), address),))
    samples: dict[str, list[float]] = {}
    async with await StoreClient.connect(topology, shared_memory=False) as client:
        bench = Bench(await client.open(SPEC, EPOCH), pipe, blocks)
        for i in range(rounds + 1):
            made = bench.chain(i * 1_000_000)
            write = await bench.timed(lambda made=made: bench.publish(made))  # type: ignore[misc]
            read = await bench.timed(lambda made=made: bench.read(made))  # type: ignore[misc]
            match = Spread.of([await bench.match_ms(made) for _ in range(20)])
            row = {
                "write_gb_s": write[0],
                "write_cpu_s_per_gb": write[1],
                "read_gb_s": read[0],
                "read_cpu_s_per_gb": read[1],
                "match64_ms_p50": match.median,
                "memcpy_gb_s": bench.memcpy_gb_s(),
            }
            if i:  # the first round warms up
                for name, value in row.items():
                    samples.setdefault(name, []).append(value)
    return {name: Spread.of(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    keep_freed_buffers()
    with apart(serve, ARENA_NBYTES) as shard:
        figures = asyncio.run(run(shard.recv(), shard, args.rounds, args.blocks))
    if args.json:
        flat: dict[str, float] = {}
        for name, one in figures.items():
            flat |= {name: one.median, f"{name}_min": one.least, f"{name}_max": one.most}
        print(json.dumps({name: round(value, 4) for name, value in flat.items()}))
        return
    for name, one in figures.items():
        print(f"{name:22} {one:8.3f}")


if __name__ == "__main__":
    main()
