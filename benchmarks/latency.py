"""What a small call to a shard in another process costs, over loopback gRPC.

    python -m benchmarks.latency [--rounds N] [--calls N] [--json]

Per round, interleaved: a bare gRPC unary call and a bare message on an open stream, with as many bytes as a
match of 64 keys has, through handlers that do nothing (the floor); a renewal of nothing (our Pipeline and an
idle core); a match of 64 keys as the transport and as `StoreSession.match` have it, in milliseconds; and keys
matched a second by one client with 16 matches under way, each released. Then once in process: the core's own
match. A match's blocks are counted, not looked at one by one. Each row is the median over rounds of a round's
median, with the least and the greatest round beside it. Everything is measured twice: with gRPC's event
engine, and with the polling that our own processes ask for (kvstore/polling.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import multiprocessing.connection
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Final

from cli.bench.figures import Spread

# What imports grpc is imported where it is used: polling has to be asked for, or not, before that.

KEYS: Final = 64
CONCURRENT: Final = 16
TIMEOUT_S: Final = 30.0
REQUEST_NBYTES: Final = 2_140  # of a match of 64 keys, and about what its answer has


def asked_to_poll(polling: bool) -> None:
    if polling:
        import kvstore.polling

        assert kvstore.polling.ACTIVE, "grpc was imported before, or this grpcio was never tried"


def serve(pipe: multiprocessing.connection.Connection, polling: bool) -> None:
    asked_to_poll(polling)
    import grpc

    from kvstore.driver import ShardDriver
    from kvstore.driver_config import DriverConfig
    from kvstore.nouns import ShardId
    from kvstore.server import ServerConfig, ShardServer
    from kvstore.tiers.host import HostTier

    async def echo(asked: bytes, _: Any) -> bytes:
        return asked

    async def echo_stream(_: Any, context: Any) -> None:
        while (asked := await context.read()) is not grpc.aio.EOF:
            await context.write(asked)

    async def run() -> None:
        config = DriverConfig(ShardId("bench"), 1 << 30, b"a secret of the benchmark")
        server = ShardServer(ShardDriver(config, HostTier()), ServerConfig())
        bare = grpc.aio.server()
        handlers: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(echo),
            "Stream": grpc.stream_stream_rpc_method_handler(echo_stream),
        }
        bare.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bare", handlers)])
        port = bare.add_insecure_port("127.0.0.1:0")
        await bare.start()
        pipe.send((await server.start(), f"127.0.0.1:{port}"))
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await bare.stop(0)
        await server.stop(0)

    asyncio.run(run())


async def timed(call: Callable[[], Awaitable[Any]], calls: int) -> list[float]:
    """Milliseconds of each."""
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - started) * 1000)
    return taken


async def measure(shard: str, bare: str, rounds: int, calls: int) -> dict[str, list[float]]:
    """A round's median each, by row."""
    import grpc

    from benchmarks.latency_store import filled
    from kvstore.client import StoreClient
    from kvstore.nouns import ShardId
    from kvstore.topology import ShardEntry, Topology

    samples: dict[str, list[float]] = {}
    asked = bytes(REQUEST_NBYTES)
    topology = Topology(1, (ShardEntry(ShardId("bench"), shard),))
    async with grpc.aio.insecure_channel(bare) as channel, await StoreClient.connect(topology) as client:
        unary: Any = channel.unary_unary("/bare/Unary")
        stream: Any = channel.stream_stream("/bare/Stream")()
        store = await filled(client, KEYS)

        async def message() -> None:
            await stream.write(asked)
            await stream.read()

        rows: dict[str, Callable[[], Awaitable[Any]]] = {
            "bare_unary_ms": lambda: unary(asked, timeout=TIMEOUT_S),
            "bare_stream_ms": message,
            "renew_ms": store.renew,
            "transport_match64_ms": store.match_on_transport,
            "match64_ms": store.match,
        }
        for i in range(rounds + 1):
            figures = {}
            for name, call in rows.items():
                taken = await timed(call, calls)
                figures[name] = Spread.of(taken).median
                if name == "match64_ms":
                    figures["match64_p99_ms"] = sorted(taken)[int(len(taken) * 0.99)]
                await store.release_all()
            figures["match_keys_per_s"] = await store.keys_per_s(CONCURRENT, calls)
            for name, value in figures.items() if i else ():  # the first round warms up
                samples.setdefault(name, []).append(value)
        stream.cancel()
    return samples


def measured(rounds: int, calls: int, polling: bool, pipe: multiprocessing.connection.Connection) -> None:
    """In a process of its own, since polling is asked for once a process."""
    asked_to_poll(polling)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=serve, args=(theirs, polling))
    server.start()
    try:
        shard, bare = ours.recv()
        samples = asyncio.run(measure(shard, bare, rounds, calls))
        ours.send(None)
        server.join(TIMEOUT_S)
    finally:
        server.kill()
    pipe.send(samples)


def run(rounds: int, calls: int, polling: bool) -> dict[str, list[float]]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    client = spawn.Process(target=measured, args=(rounds, calls, polling, theirs))
    client.start()
    theirs.close()
    try:
        samples: dict[str, list[float]] = ours.recv()
    except EOFError:
        sys.exit("the measuring process failed: see above")
    finally:
        client.join(TIMEOUT_S)
        client.kill()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=500, help="of each row and round")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    document: dict[str, Any] = {}
    for name, polling in (("event_engine", False), ("polling", True)):
        samples = run(args.rounds, args.calls, polling)
        document[name] = {row: Spread.of(values) for row, values in samples.items()}
    document["core_match64_us"] = asyncio.run(core_us(args.calls))
    if args.json:
        print(json.dumps(document, default=asdict))
        return
    print(f"{'':24}{'event engine':>26}{'polling':>26}")
    for row in document["polling"]:
        both = [document[name][row] for name in ("event_engine", "polling")]
        print(f"{row:24}" + "".join(f"{_shown(one):>26}" for one in both))
    print(f"{'core_match64_us':24}{document['core_match64_us']:26.1f}")


async def core_us(calls: int) -> float:
    from benchmarks.latency_store import core_match_us

    return await core_match_us(KEYS, calls)


def _shown(one: Spread) -> str:
    return f"{one:.3f}" if one.median < 1000 else f"{one:.0f}"


if __name__ == "__main__":
    main()
