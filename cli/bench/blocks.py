"""Our own store: blocks read from, and written to, a shard in another process, over each transport.

A read is what an engine does for a prompt: match its chain, read every block into the caller's own memory,
release. Blocks are asked for in scattered order. Every byte that arrives is compared with the oracle after
the clock has stopped; a block that is missing, refused or wrong ends the bench.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cli.bench.figures import Moved, cpu_s
from cli.bench.jsonlines import Child
from cli.bench.oracle import Bytes, WrongBytes, check, payload
from cli.bench.plan import KIB, SIZES, TIMEOUT_S, Plan
from kvstore.answers import Leases, PublishBlock, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.hashing import KeyChain
from kvstore.nouns import (
    BlockKey,
    Epoch,
    KVLayout,
    NamespaceSpec,
    PinnedBlock,
    Quality,
    Refusal,
    WeightsDigest,
)
from kvstore.session import StoreSession

EPOCH = Epoch(1, WeightsDigest(bytes(16)))
_LEASE_S = 600.0
_TOKENS_A_CHAIN = 1 << 16


def layout(nbytes: int) -> KVLayout:
    """Blocks of 32 tokens, 8 heads of 64 and float16: a layer has 64 KiB."""
    return KVLayout(nbytes // (64 * KIB), 0, 8, 64, "float16")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt's blocks: what a match finds and a read delivers."""

    chain: KeyChain
    payloads: list[Bytes]


class Sessions:
    """One client over one transport: a session for every size of block."""

    def __init__(self, client: StoreClient, by_size: dict[int, StoreSession]) -> None:
        self.client = client
        self.by_size = by_size

    @classmethod
    async def open(cls, client: StoreClient) -> Sessions:
        specs = {nbytes: NamespaceSpec("bench", layout(nbytes), bytes(16)) for nbytes in SIZES}
        return cls(client, {nbytes: await client.open(spec, EPOCH) for nbytes, spec in specs.items()})


class OurBlocks:
    """The blocks of all sizes that stay resident, and the measurements over them."""

    def __init__(self, plan: Plan, shard: Child) -> None:
        self._plan = plan
        self._shard = shard
        self._chains_made = 0
        self._resident: dict[int, list[Request]] = {}
        self._pins: list[tuple[StoreSession, Leases]] = []
        self._random = random.Random(7)  # noqa: S311  # an order, not a secret

    async def load(self, session: StoreSession, nbytes: int) -> list[Request]:
        """Publish the working set, pinned: what the writes of later rounds push out are other writes."""
        made = [self._request(session, nbytes) for _ in range(self._plan.requests(nbytes))]
        for request in made:
            self._pins.append((session, await self._publish(session, request, _LEASE_S)))
        self._resident[nbytes] = made
        return made

    async def keep(self) -> None:
        """Renew what holds the working sets. Once a round: a round takes less than a lease."""
        for session, leases in self._pins:
            if not await session.renew(leases, _LEASE_S):
                raise WrongBytes("a lease on the working set was lost before it ended")

    def blocks(self, nbytes: int) -> tuple[list[BlockKey], list[Bytes]]:
        """Keys and payloads of the working set, flat."""
        requests = self._resident[nbytes]
        keys = [key for request in requests for key in request.chain.keys]
        return keys, [one for request in requests for one in request.payloads]

    def order(self, nbytes: int) -> list[int]:
        """A scattered order of the working set: requests shuffled, and the blocks within each."""
        count, order = self._plan.request_blocks(nbytes), []
        for request in self._random.sample(range(self._plan.requests(nbytes)), self._plan.requests(nbytes)):
            order += [request * count + i for i in self._random.sample(range(count), count)]
        return order

    async def read(
        self, session: StoreSession, nbytes: int, order: Sequence[int], into: Sequence[Bytes]
    ) -> tuple[Moved, Moved]:
        """The whole of it; and the same without the time that matches and releases took.

        A release goes on beside the next request, as an engine's does; the clock stops when all are done.
        """
        count, bytes_s = self._plan.request_blocks(nbytes), 0.0
        cpu, started = self._cpu_s(), time.perf_counter()
        releasing: list[asyncio.Task[None]] = []
        for at in range(0, len(order), count):
            request = self._resident[nbytes][order[at] // count]
            scattered = [i % count for i in order[at : at + count]]
            leases, taken = await _read_one(session, request, scattered, into[at:])
            releasing.append(asyncio.create_task(session.release(leases)))
            bytes_s += taken
        await asyncio.gather(*releasing)
        wall = time.perf_counter() - started
        used, moved = self._cpu_s() - cpu, nbytes * len(order)
        return Moved(moved, wall, used), Moved(moved, bytes_s, used)

    async def write(self, session: StoreSession, nbytes: int, into: Sequence[Bytes]) -> Moved:
        """Publish a prompt nobody has; then, off the clock, read it back."""
        request = self._request(session, nbytes)
        cpu, started = self._cpu_s(), time.perf_counter()
        await self._publish(session, request, None)
        moved = Moved(nbytes * len(request.payloads), time.perf_counter() - started, self._cpu_s() - cpu)
        leases, _ = await _read_one(session, request, range(len(request.payloads)), into)
        await session.release(leases)
        for i, expected in enumerate(request.payloads):
            check("a read after a write", request.chain.keys[i].hex()[:12], into[i], expected)
        return moved

    def _request(self, session: StoreSession, nbytes: int) -> Request:
        """A chain of its own, whose payloads are functions of its keys."""
        chain = KeyChain(session.namespace, session.layout.block_tokens)
        first = self._chains_made * _TOKENS_A_CHAIN
        chain.extend(range(first, first + self._plan.request_blocks(nbytes) * session.layout.block_tokens))
        self._chains_made += 1
        return Request(chain, [payload(key, nbytes) for key in chain.keys])

    async def _publish(self, session: StoreSession, request: Request, pin_for_s: float | None) -> Leases:
        chain = request.chain
        blocks = [
            PublishBlock(key, chain.parent(i), i, chain.placement(i), request.payloads[i].data)
            for i, key in enumerate(chain.keys)
        ]
        done = await session.publish(
            blocks, quality=Quality.LOSSLESS, owner="bench", pin_for_s=pin_for_s, timeout_s=TIMEOUT_S
        )
        refused = [answer for answer in done.blocks if isinstance(answer, Refusal)]
        if refused:
            raise WrongBytes(f"the store refused {len(refused)} of {len(blocks)} blocks: {refused[0].value}")
        return done.leases

    def _cpu_s(self) -> float:
        return cpu_s() + float(self._shard.ask("cpu", TIMEOUT_S)["cpu_s"])


async def _read_one(
    session: StoreSession, request: Request, order: Sequence[int], into: Sequence[Bytes]
) -> tuple[Leases, float]:
    """Match and read; the leases to release, and how long the read alone took, in seconds."""
    found = await session.match(request.chain.keys, owner="bench", lease_s=60, timeout_s=TIMEOUT_S)
    if len(found.blocks) != len(request.chain.keys):
        raise WrongBytes(f"only {len(found.blocks)} of {len(request.chain.keys)} blocks match: {found.miss}")
    blocks = [found.blocks[i] for i in order]
    started = time.perf_counter()
    await _deliver(session, blocks, into)
    return found.leases, time.perf_counter() - started


async def _deliver(session: StoreSession, blocks: Sequence[PinnedBlock], into: Sequence[Bytes]) -> None:
    """Verified, and in the caller's own memory: by `read_into` where the session has it."""
    read_into: Any = getattr(session, "read_into", None)
    if read_into is not None:
        buffers = [buffer.data for buffer, _ in zip(into, blocks, strict=False)]
        answers = await read_into(blocks, buffers, timeout_s=TIMEOUT_S)
        missed = [a for a in answers if not isinstance(a, VerifiedBlock)]
        if missed:
            raise WrongBytes(f"{len(missed)} of {len(blocks)} blocks did not arrive: {missed[0]}")
        return
    async for item in session.read(blocks, timeout_s=TIMEOUT_S):
        if not isinstance(item, VerifiedBlock):
            raise WrongBytes(f"block {item.key.hex()[:12]} did not arrive: {item.reason.value}")
        into[item.index].data[:] = item.payload
