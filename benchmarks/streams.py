"""What a byte costs over loopback gRPC, part by part: what no user of grpcio goes below, what ours adds.

    python -m benchmarks.streams [--total N] [--rounds N]

Rows, interleaved: raw TCP; a server stream of bytes made before, thrown away; the same packed anew for each
message, as any server must whose bytes lie elsewhere; copied besides into the reader's memory and hashed
there; and the store's own read of blocks of 1 MiB. Messages hold 2 MiB. CPU seconds are of both processes.
"""

from __future__ import annotations

import kvstore.polling  # noqa: F401 - before anything that imports grpc

# isort: split
import argparse
import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import numpy as np

from benchmarks.blocks import ARENA_NBYTES, EPOCH, TOKEN, Reader, spec_of
from benchmarks.serving import SHARD, Pipe, apart, serve
from cli.bench.figures import Moved, Spread, cpu_s
from kvstore.client import StoreClient
from kvstore.memory import keep_freed_buffers
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.grpc.options import channel_options, server_options
from kvstore.transport.landing import copy_and_hash

MESSAGE_NBYTES: Final = 2 << 20
BLOCK_NBYTES: Final = 1 << 20
TIMEOUT_S: Final = 60.0
SERVICE: Final = "Floor"
Work = Callable[[], Awaitable[None]]


def serve_bare(pipe: Pipe, total_nbytes: int) -> None:
    """Bytes by TCP and by gRPC. Tell both ports; then answer as `serving.serve` does."""
    keep_freed_buffers()
    source = np.random.default_rng(0).integers(0, 256, total_nbytes, dtype=np.uint8).data
    made = bytes(source[:MESSAGE_NBYTES])
    pieces = [source[at : at + MESSAGE_NBYTES] for at in range(0, total_nbytes, MESSAGE_NBYTES)]

    async def ready(_: bytes, context: Any) -> None:
        for _piece in pieces:
            await context.write(made)

    async def packed(_: bytes, context: Any) -> None:
        for piece in pieces:
            await context.write(b"".join((b"head", piece)))

    def accept(listening: socket.socket) -> None:
        connected, _ = listening.accept()
        while connected.recv(1):
            for piece in pieces:
                connected.sendall(piece)

    async def run() -> None:
        server = grpc.aio.server(options=server_options())
        handlers: dict[str, Any] = {
            name: grpc.unary_stream_rpc_method_handler(handler)
            for name, handler in (("ready", ready), ("packed", packed))
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        loop = asyncio.get_running_loop()
        listening = socket.create_server(("127.0.0.1", 0))
        loop.run_in_executor(None, accept, listening)
        pipe.send((listening.getsockname()[1], port))
        while await loop.run_in_executor(None, pipe.recv):
            pipe.send(cpu_s())

    asyncio.run(run())


class Bare:
    """The reader of `serve_bare`: into warm memory, or nowhere."""

    def __init__(self, channel: grpc.aio.Channel, connected: socket.socket, total_nbytes: int) -> None:
        self._channel = channel
        self._connected = connected
        self._target = np.ones(total_nbytes, dtype=np.uint8).data

    async def tcp(self) -> None:
        self._connected.sendall(b"!")
        at = 0
        while at < self._target.nbytes:
            at += self._connected.recv_into(self._target[at : at + MESSAGE_NBYTES])

    async def ready(self) -> None:
        async for _ in self._messages("ready"):
            pass

    async def packed(self) -> None:
        async for _ in self._messages("packed"):
            pass

    async def landed(self) -> None:
        at = 0
        async for message in self._messages("packed"):
            body = memoryview(message)[-MESSAGE_NBYTES:]
            copy_and_hash(self._target[at : at + MESSAGE_NBYTES], body)
            at += MESSAGE_NBYTES

    async def _messages(self, name: str) -> AsyncIterator[bytes]:
        call: Any = self._channel.unary_stream(f"/{SERVICE}/{name}")
        async for message in call(b"", timeout=TIMEOUT_S):
            yield message


@asynccontextmanager
async def store_reader(address: str, pipe: Pipe, total_nbytes: int) -> AsyncIterator[Work]:
    topology = Topology(1, (ShardEntry(SHARD, address),))
    async with await StoreClient.connect(topology, token=TOKEN, shared_memory=False) as client:
        reader = Reader(await client.open(spec_of(BLOCK_NBYTES), EPOCH), pipe, BLOCK_NBYTES, total_nbytes)
        await reader.publish()
        blocks = await reader.found()
        yield lambda: reader.read(blocks)


async def measure(bare_pipe: Pipe, store_pipe: Pipe, total_nbytes: int, rounds: int) -> None:
    (tcp_port, grpc_port), address = bare_pipe.recv(), store_pipe.recv()

    def used_s() -> float:
        for pipe in (bare_pipe, store_pipe):
            pipe.send(True)
        return cpu_s() + float(bare_pipe.recv()) + float(store_pipe.recv())

    samples: dict[str, list[Moved]] = {}
    with socket.create_connection(("127.0.0.1", tcp_port)) as connected:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=channel_options("bulk")) as channel,
            store_reader(address, store_pipe, total_nbytes) as ours,
        ):
            bare = Bare(channel, connected, total_nbytes)
            rows: dict[str, Work] = {
                "raw TCP": bare.tcp,
                "gRPC, thrown away": bare.ready,
                "and packed anew": bare.packed,
                "and copied, hashed": bare.landed,
                "the store's read": ours,
            }
            for _ in range(rounds + 1):
                for name, work in rows.items():
                    used, started = used_s(), time.perf_counter()
                    await work()
                    taken = time.perf_counter() - started
                    samples.setdefault(name, []).append(Moved(total_nbytes, taken, used_s() - used))
    for name, (_, *rest) in samples.items():  # the first round warms up
        speed, cpu = Spread.of(one.gib_s for one in rest), Spread.of(one.cpu_s_per_gb for one in rest)
        print(f"{name:20} {speed:5.2f} GiB/s  {cpu:5.2f} cpu-s/GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--total", type=int, default=128, help="MiB a round, even")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    total_nbytes = args.total << 20
    keep_freed_buffers()
    with apart(serve_bare, total_nbytes) as bare, apart(serve, ARENA_NBYTES, TOKEN) as store:
        asyncio.run(measure(bare, store, total_nbytes, args.rounds))


if __name__ == "__main__":
    main()
