"""The control path over gRPC, from another process than the shard: matches, and commits that must be seen.

Blocks here are of 128 bytes: what is measured is the calls. A match is timed alone; its release follows
off the clock, as an engine's does.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from cli.bench.blocks import EPOCH
from cli.bench.figures import Spread
from cli.bench.oracle import WrongBytes, payload
from cli.bench.plan import TIMEOUT_S, Plan
from kvstore.answers import Leases, Match, PublishBlock
from kvstore.client import StoreClient
from kvstore.hashing import KeyChain
from kvstore.nouns import BlockKey, KVLayout, NamespaceSpec, Quality
from kvstore.session import StoreSession

MATCH_KEYS: Final = 64  # a prompt of 2,048 tokens
MATCH_KEYS_MANY: Final = 256  # one of 8,192 tokens
MATCHES_IN_FLIGHT: Final = 4
PAIRS_IN_FLIGHT: Final = 8
_PIN_S: Final = 600.0

_LAYOUT: Final = KVLayout(1, 0, 1, 1, "float16")
SPEC: Final = NamespaceSpec("bench-control", _LAYOUT, bytes(16))


def chain(session: StoreSession, number: int, blocks: int) -> KeyChain:
    made = KeyChain(session.namespace, _LAYOUT.block_tokens)
    first = number * MATCH_KEYS_MANY * _LAYOUT.block_tokens
    made.extend(range(first, first + blocks * _LAYOUT.block_tokens))
    return made


class Control:
    """Two clients of one shard: connections of their own, nothing shared."""

    def __init__(self, plan: Plan, writer: StoreSession, reader: StoreSession) -> None:
        self._plan = plan
        self._writer = writer
        self._reader = reader
        self._keys: list[BlockKey] = []
        self._pins: Leases = ()

    @classmethod
    async def open(cls, plan: Plan, writer: StoreClient, reader: StoreClient) -> Control:
        control = cls(plan, await writer.open(SPEC, EPOCH), await reader.open(SPEC, EPOCH))
        made = chain(control._reader, 0, MATCH_KEYS_MANY)
        control._pins = await control._publish(made, _PIN_S)
        control._keys = made.keys
        return control

    async def keep(self) -> None:
        """Renew what holds the keys that are matched: writes of other rows would push them out."""
        await self._writer.renew(self._pins, _PIN_S)

    async def match64_ms(self) -> float:
        """The median of this round's matches."""
        taken = []
        for _ in range(self._plan.matches):
            started = time.perf_counter()
            found = await self._match(self._keys[:MATCH_KEYS])
            taken.append((time.perf_counter() - started) * 1000)
            await self._reader.release(found.leases)
        return Spread.of(taken).median

    async def match_keys_per_s(self) -> float:
        """One client, MATCHES_IN_FLIGHT matches of MATCH_KEYS_MANY keys at a time, releases included."""

        async def one_after_another(matches: int) -> None:
            for _ in range(matches):
                await self._reader.release((await self._match(self._keys)).leases)

        each = self._plan.throughput_matches // MATCHES_IN_FLIGHT
        started = time.perf_counter()
        await asyncio.gather(*(one_after_another(each) for _ in range(MATCHES_IN_FLIGHT)))
        return each * MATCHES_IN_FLIGHT * MATCH_KEYS_MANY / (time.perf_counter() - started)

    async def read_your_writes(self) -> int:
        """Commit by one client, then match by another, for every pair; how many were missed."""
        misses = 0

        async def pairs(first: int) -> None:
            nonlocal misses
            for number in range(first, self._plan.pairs, PAIRS_IN_FLIGHT):
                made = chain(self._writer, 1 + number, 1)
                await self._publish(made)
                found = await self._reader.match(made.keys, owner="r", lease_s=60, timeout_s=TIMEOUT_S)
                misses += len(found.blocks) != 1
                await self._reader.release(found.leases)

        await asyncio.gather(*(pairs(first) for first in range(PAIRS_IN_FLIGHT)))
        return misses

    async def _match(self, keys: list[BlockKey]) -> Match:
        found = await self._reader.match(keys, owner="bench", lease_s=60, timeout_s=TIMEOUT_S)
        if len(found.blocks) != len(keys):
            raise WrongBytes(f"only {len(found.blocks)} of {len(keys)} keys match: {found.miss}")
        return found

    async def _publish(self, made: KeyChain, pin_for_s: float | None = None) -> Leases:
        blocks = [
            PublishBlock(key, made.parent(i), i, made.placement(i), payload(key, _LAYOUT.block_nbytes).data)
            for i, key in enumerate(made.keys)
        ]
        done = await self._writer.publish(
            blocks, quality=Quality.LOSSLESS, owner="w", pin_for_s=pin_for_s, timeout_s=TIMEOUT_S
        )
        return done.leases
