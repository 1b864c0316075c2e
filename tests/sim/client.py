"""One user of the simulated store: random work, and every answer checked against what must hold."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.answers import BlockMiss, PublishBlock, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.hashing import KeyChain
from kvstore.nouns import LeaseId, MissReason, PinnedBlock, Quality, ShardId
from kvstore.session import StoreSession
from kvstore.transport.sim import SimTransport
from tests.kvstore.oracle import SPEC, chain, epoch, payload

if TYPE_CHECKING:
    from tests.sim.world import World

OPS_A_CLIENT = 14
CHAINS = 4
CHAIN_BLOCKS = 20  # two stripes: a chain may lie on two shards
LEASE_S = 4.0
SURE = 0.9  # of a lease: clocks differ by less
TIMEOUT_S = 2.0
QUALITIES = (Quality.LOSSLESS, Quality.LOSSLESS, Quality.INT8)
EXCUSES = {MissReason.DEADLINE, MissReason.SHARD_UNAVAILABLE}
"""Why a block may not arrive although it is there."""
WRONG_BYTES = {
    MissReason.CHECKSUM,
    MissReason.BAD_HEADER,
    MissReason.OTHER_KEY,
    MissReason.OTHER_EPOCH,
    MissReason.OTHER_WEIGHTS,
    MissReason.OTHER_NAMESPACE,
    MissReason.OTHER_LAYOUT,
}
"""What a reader finds in bytes that a shard should not have given out; only storage may be to blame."""

Leases = tuple[tuple[ShardId, LeaseId], ...]


class Broken(AssertionError):
    """A promise that did not hold, in words."""


@dataclass(slots=True)
class Held:
    """Blocks a client was told are pinned for it, and until when that is certain."""

    of: int  # chain
    epoch: int
    blocks: tuple[PinnedBlock, ...]
    leases: Leases
    sure_until: float
    crashes: dict[ShardId, int]


class Client:
    """One user of the store: random work, every answer checked."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.store = StoreClient.over([SimTransport(h, world.network) for h in world.hosts.values()])
        self.sessions: dict[int, StoreSession] = {}
        self.held: list[Held] = []
        self.operations = (
            self.publish,
            self.match_and_read,
            self.read_held,
            self.renew,
            self.let_go,
            self.advance,
            self.idle,
        )

    async def work(self) -> None:
        rng = self.world.rng
        for _ in range(OPS_A_CLIENT):
            op = rng.choices(
                (
                    self.publish,
                    self.match_and_read,
                    self.read_held,
                    self.renew,
                    self.let_go,
                    self.advance,
                    self.idle,
                ),
                (5, 6, 3, 2, 2, 1, 1),
            )[0]
            self.world.report.ops[op.__name__] += 1
            if rng.random() < 0.06:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.3):
                        await op()  # the user gave up in the middle
                self.world.report.ops["given up"] += 1
            else:
                await op()
            self.held = [
                held for held in self.held if held.sure_until > self.world.now() or rng.random() < 0.8
            ]

    async def end(self) -> None:
        for held in self.held:
            if self.world.rng.random() < 0.5:
                await self.store_session(held.epoch).release(held.leases)
        await self.store.close()

    # -- operations --------------------------------------------------------------------------------

    async def publish(self) -> None:
        rng, session = self.world.rng, await self.session()
        if session is None:
            return
        of, made = self.chain(session)
        end = rng.randrange(1, CHAIN_BLOCKS + 1)
        begin = rng.randrange(end) if rng.random() < 0.3 else 0
        quality = rng.choice(QUALITIES)
        blocks = [
            PublishBlock(
                made.keys[i], made.parent(i), i, made.placement(i),
                memoryview(payload(made.keys[i], session.epoch, quality)),
            )
            for i in range(begin, end)
        ]  # fmt: skip
        pin_for_s = LEASE_S if rng.random() < 0.7 else None
        asked, crashes = self.world.now(), self.world.crashes()
        done = await session.publish(
            blocks, quality=quality, owner=self.name, pin_for_s=pin_for_s, timeout_s=TIMEOUT_S
        )
        landed = tuple(block for block in done.blocks if isinstance(block, PinnedBlock))
        self.count("refused", [b.value for b in done.blocks if not isinstance(b, PinnedBlock)])
        if landed and done.leases:
            self.keep(of, session, landed, done.leases, asked, crashes)
            if begin == 0 and len(landed) == len(blocks):
                await self.anybody_sees(made, end, quality)

    async def anybody_sees(self, made: KeyChain, end: int, quality: Quality) -> None:
        """Acknowledged and pinned means that every later match sees it."""
        held = self.held[-1]
        if quality < self.least(held):
            return
        session = self.store_session(held.epoch)
        found = await session.match(made.keys[:end], owner=self.name, lease_s=LEASE_S, timeout_s=TIMEOUT_S)
        if self.sure(held) and found.miss not in (None, *EXCUSES):
            raise Broken(f"acknowledged, pinned, and not seen: block {len(found.blocks)} is {found.miss}")
        await session.release(found.leases)

    async def match_and_read(self) -> None:
        rng, session = self.world.rng, await self.session()
        if session is None:
            return
        of, made = self.chain(session)
        asked, crashes = self.world.now(), self.world.crashes()
        found = await session.match(
            made.keys[: rng.randrange(1, CHAIN_BLOCKS + 1)],
            owner=self.name,
            lease_s=LEASE_S,
            timeout_s=TIMEOUT_S,
        )
        self.count("match", [found.miss.value] if found.miss else [])
        if not found.blocks:
            return
        self.keep(of, session, found.blocks, found.leases, asked, crashes)
        if rng.random() < 0.8:
            await self.read(self.held[-1])

    async def read_held(self) -> None:
        """Perhaps long after the lease ended: a stale reference must be a miss."""
        if self.held:
            await self.read(self.world.rng.choice(self.held))

    async def read(self, held: Held) -> None:
        session = self.store_session(held.epoch)
        whole = self.world.rng.random() < 0.8
        try:
            items = session.read(held.blocks, timeout_s=TIMEOUT_S)
            index = 0
            async for item in items:
                self.check(held, index, item)
                index += 1
                if not whole and self.world.rng.random() < 0.3:
                    self.world.network.met["abandoned", "read"] += 1
                    break
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    async def renew(self) -> None:
        leased = [held for held in self.held if held.leases]
        if not leased:
            return
        held, asked = self.world.rng.choice(leased), self.world.now()
        if await self.store_session(held.epoch).renew(held.leases, LEASE_S):
            held.sure_until = max(held.sure_until, asked + SURE * LEASE_S)

    async def let_go(self) -> None:
        if self.held:
            held = self.held.pop(self.world.rng.randrange(len(self.held)))
            released = Held(held.of, held.epoch, held.blocks, (), 0.0, held.crashes)
            await self.store_session(held.epoch).release(held.leases)
            if self.world.rng.random() < 0.5:
                self.held.append(released)  # to be read all the same

    async def advance(self) -> None:
        """New weights: this client serves them from now on, others still serve the old ones."""
        self.world.epoch += 1
        self.sessions.pop(self.world.epoch, None)
        if await self.session() is not None:
            for transport in self.store._peers.transports.values():
                with contextlib.suppress(Exception):
                    await transport.advance_epoch(SPEC.model_id, self.world.epoch, timeout_s=TIMEOUT_S)

    async def idle(self) -> None:
        await asyncio.sleep(self.world.rng.uniform(0.0, 1.5 * LEASE_S))

    # -- what must hold ----------------------------------------------------------------------------

    def check(self, held: Held, index: int, item: VerifiedBlock | BlockMiss) -> None:
        pinned, report = held.blocks[index], self.world.report
        if item.index != index:
            raise Broken(f"item {item.index} came as the {index}th")
        if isinstance(item, BlockMiss):
            report.reasons[f"read:{item.reason.value}"] += 1
            if self.world.storage_broken:
                return
            if item.reason in WRONG_BYTES:
                raise Broken(f"a shard gave out bytes that are {item.reason} for {pinned}")
            if item.reason is MissReason.LOW_QUALITY and pinned.quality < self.least(held):
                return  # it published what it would not read
            if self.sure(held, pinned.ref.shard) and item.reason not in EXCUSES:
                raise Broken(
                    f"pinned for another {held.sure_until - self.world.now():.2f} s, yet {item.reason}"
                )
            return
        report.blocks_read += 1
        if item.epoch.number != held.epoch:
            raise Broken(f"asked for epoch {held.epoch}, got {item.epoch.number}")
        if item.payload != payload(pinned.key, item.epoch, item.quality):
            raise Broken(f"wrong bytes for {pinned}: a wrong hit")

    def sure(self, held: Held, shard: ShardId | None = None) -> bool:
        """Is it certain that the shards still hold this for us?"""
        shards = {block.ref.shard for block in held.blocks} if shard is None else {shard}
        crashes = self.world.crashes()
        return self.world.now() < held.sure_until and all(crashes[s] == held.crashes[s] for s in shards)

    # -- inside ------------------------------------------------------------------------------------

    async def session(self) -> StoreSession | None:
        """Of the newest epoch, or at times of an older one that is still served."""
        number = self.world.epoch if self.world.rng.random() < 0.8 else max(1, self.world.epoch - 1)
        if number not in self.sessions:
            least = self.world.rng.choice((Quality.LOSSLESS, Quality.INT8))
            try:
                self.sessions[number] = await self.store.open(SPEC, epoch(number), min_quality=least)
            except Exception as error:
                self.world.report.reasons[f"open:{type(error).__name__}"] += 1
                return None
        return self.sessions[number]

    def store_session(self, number: int) -> StoreSession:
        return self.sessions[number]

    def least(self, held: Held) -> Quality:
        return self.store_session(held.epoch).min_quality

    def chain(self, session: StoreSession) -> tuple[int, KeyChain]:
        of = self.world.rng.randrange(CHAINS)
        return of, chain(session.namespace, CHAIN_BLOCKS, 1000 * of)

    def keep(
        self, of: int, session: StoreSession, blocks: tuple[PinnedBlock, ...], leases: Leases,
        asked: float, crashes: dict[ShardId, int],
    ) -> None:  # fmt: skip
        self.held.append(Held(of, session.epoch.number, blocks, leases, asked + SURE * LEASE_S, crashes))

    def count(self, what: str, reasons: list[str]) -> None:
        self.world.report.reasons.update(f"{what}:{reason}" for reason in reasons)
