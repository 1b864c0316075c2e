"""How fast blocks are read into a reader's own buffers, shared memory and gRPC, beside a memcpy of the same.

    python -m benchmarks.blocks [--nbytes N ...] [--total N] [--rounds N]

The shard is another process. Reader and memcpy take the same blocks in the same scattered order, more than
the caches hold, into the same warm buffers; the memcpy's source is this process's own memory. Rounds are
interleaved. Every block is verified. CPU seconds are of both processes.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np

from benchmarks.serving import Pipe, apart, serve
from cli.bench.figures import Spread, cpu_s
from kvstore.answers import PublishBlock, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.hashing import KeyChain
from kvstore.memory import keep_freed_buffers
from kvstore.nouns import Epoch, KVLayout, NamespaceSpec, PinnedBlock, Quality, ShardId, WeightsDigest
from kvstore.session import StoreSession
from kvstore.topology import ShardEntry, Topology

EPOCH = Epoch(1, WeightsDigest(bytes(16)))
TIMEOUT_S = 60.0
TOKEN = "a token"  # noqa: S105 - of a shard that lives as long as the benchmark
ARENA_NBYTES = 2 << 30


def spec_of(nbytes: int) -> NamespaceSpec:
    """A layout whose block has `nbytes`, a multiple of 4 KiB."""
    layout = KVLayout(layers=1, head_begin=0, head_end=nbytes // 4096, head_dim=16, dtype="float32")
    assert layout.block_nbytes == nbytes
    return NamespaceSpec(f"bench-{nbytes}", layout, bytes(16))


class Reader:
    """One block size: its blocks are in the store, its buffers are warm."""

    def __init__(self, session: StoreSession, pipe: Pipe, nbytes: int, total_nbytes: int) -> None:
        self.session = session
        self.pipe = pipe
        self.blocks = max(4, total_nbytes // nbytes)
        self.gib = self.blocks * nbytes / 2**30
        rng = np.random.default_rng(0)
        self.source = rng.integers(0, 256, self.blocks * nbytes, dtype=np.uint8).reshape(self.blocks, nbytes)
        self.buffers = [np.ones(nbytes, dtype=np.uint8) for _ in range(self.blocks)]
        self.order = rng.permutation(self.blocks).tolist()
        self.chain = KeyChain(session.namespace, session.layout.block_tokens)
        self.chain.extend(range(self.blocks * session.layout.block_tokens))

    async def publish(self) -> None:
        made = self.chain
        blocks = [
            PublishBlock(key, made.parent(i), i, made.placement(i), self.source[i].data)
            for i, key in enumerate(made.keys)
        ]
        done = await self.session.publish(
            blocks, quality=Quality.LOSSLESS, owner="bench", pin_for_s=None, timeout_s=TIMEOUT_S
        )
        assert all(isinstance(block, PinnedBlock) for block in done.blocks)

    async def read(self, blocks: list[PinnedBlock]) -> None:
        answers = await self.session.read_into(blocks, self.buffers, timeout_s=TIMEOUT_S)
        assert all(isinstance(answer, VerifiedBlock) for answer in answers)

    async def found(self) -> list[PinnedBlock]:
        match = await self.session.match(self.chain.keys, owner="b", lease_s=60, timeout_s=TIMEOUT_S)
        assert len(match.blocks) == self.blocks
        return [match.blocks[i] for i in self.order]

    async def memcpy(self) -> None:
        for buffer, i in zip(self.buffers, self.order, strict=True):
            np.copyto(buffer, self.source[i])

    async def timed(self, work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
        """GiB/s, and CPU seconds of both processes per GB."""
        before, started = self.both_cpu_s(), time.perf_counter()
        await work()
        wall = time.perf_counter() - started
        return self.gib / wall, (self.both_cpu_s() - before) / (self.gib * 2**30 / 1e9)

    def both_cpu_s(self) -> float:
        self.pipe.send(True)
        return float(self.pipe.recv()) + cpu_s()


async def measure(address: str, pipe: Pipe, nbytes: int, total_nbytes: int, rounds: int) -> None:
    topology = Topology(1, (ShardEntry(ShardId("bench"), address),))
    spec = spec_of(nbytes)
    async with (
        await StoreClient.connect(topology, token=TOKEN) as near,
        await StoreClient.connect(topology, token=TOKEN, shared_memory=False) as far,
    ):
        shm = Reader(await near.open(spec, EPOCH), pipe, nbytes, total_nbytes)
        grpc = Reader(await far.open(spec, EPOCH), pipe, nbytes, total_nbytes)
        await shm.publish()
        assert near.counters["shm:attached"] == 1, near.counters
        blocks = await shm.found()
        rows: dict[str, list[tuple[float, float]]] = {"memcpy": [], "shm": [], "grpc": []}
        for i in range(rounds + 1):
            for name, work in (
                ("memcpy", shm.memcpy),
                ("shm", lambda: shm.read(blocks)),
                ("grpc", lambda: grpc.read(blocks)),
            ):
                row = await shm.timed(work)
                if i:
                    rows[name].append(row)
        limit = Spread.of(gib_s for gib_s, _ in rows["memcpy"]).median
        for name, values in rows.items():
            speed, cpu = (Spread.of(column) for column in zip(*values, strict=True))
            print(
                f"{nbytes:>9} {name:8} {speed:6.2f} GiB/s  {speed.median / limit:5.2f} of memcpy"
                f"  {cpu.median:5.2f} cpu-s/GB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nbytes", type=int, nargs="+", default=[64 << 10, 1 << 20, 4 << 20])
    parser.add_argument("--total", type=int, default=128 << 20, help="bytes a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_freed_buffers()
    with apart(serve, ARENA_NBYTES, TOKEN) as shard:
        address = shard.recv()
        for nbytes in args.nbytes:
            asyncio.run(measure(address, shard, nbytes, args.total, args.rounds))


if __name__ == "__main__":
    main()
