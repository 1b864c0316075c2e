"""One user of the simulated store: random work, and every answer checked against what must hold.

The everyday half: publish, match, read, hold, renew, let go. Deletion, weights that change, snapshots of the
past, lineage and trespassing are in deeds.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.answers import BlockMiss, PublishBlock, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.errors import KVStrataError
from kvstore.hashing import KeyChain
from kvstore.nouns import (
    BlockKey,
    LeaseId,
    MissReason,
    NamespaceId,
    PinnedBlock,
    Quality,
    Refusal,
    ShardId,
)
from kvstore.session import StoreSession
from tests.kvstore.oracle import SPEC, epoch
from tests.sim.history import SURE, NotingTransport
from tests.sim.witness import covers
from tests.sim.writings import Broken, Writing

if TYPE_CHECKING:
    from tests.sim.deeds import Audit
    from tests.sim.world import World

OPS_A_CLIENT = 18
CHAINS = (0, 0, 1, 2)
CHAIN_BLOCKS = 20  # two stripes: a chain may lie on two shards
LEASE_S = 4.0
TIMEOUT_S = 2.0
QUALITIES = (Quality.LOSSLESS, Quality.INT8)
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


@dataclass(slots=True)
class Held:
    """Blocks a client was told are pinned for it, and until when that is certain."""

    session: StoreSession
    blocks: tuple[PinnedBlock, ...]
    leases: Leases
    since: int  # the step it was asked for at
    sure_until: float
    crashes: dict[ShardId, int]
    writings: dict[int, Writing] = field(default_factory=dict)  # whose bytes block i was, once read
    qualities: dict[int, Quality] = field(default_factory=dict)  # and what the reader was told they are


class Client:
    """One user of the store: random work, every answer checked."""

    def __init__(self, world: World, name: str, tenant: str) -> None:
        self.world = world
        self.name = name
        self.tenant = tenant
        self.transports = [NotingTransport(h, world.network, world.history) for h in world.hosts.values()]
        self.store = StoreClient.over(self.transports)
        self.sessions: dict[int, StoreSession] = {}
        self.held: list[Held] = []
        self.audits: list[Audit] = []

    async def work(self, deeds: Mapping[Deed, int]) -> None:
        rng, report = self.world.rng, self.world.report
        for _ in range(OPS_A_CLIENT):
            (deed,) = rng.choices(tuple(deeds), tuple(deeds.values()))
            report.ops[deed.__name__] += 1
            if rng.random() < 0.06:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.3):
                        await deed(self)  # the user gave up in the middle
                report.ops["given up"] += 1
            else:
                await deed(self)
            self.held = [
                held for held in self.held if held.sure_until > self.world.now() or rng.random() < 0.9
            ]

    async def end(self) -> None:
        for held in self.held:
            if self.world.rng.random() < 0.5:
                await held.session.release(held.leases)
        await self.store.close()

    # -- deeds -------------------------------------------------------------------------------------

    async def publish(self) -> None:
        rng, session = self.world.rng, await self.session()
        if session is None:
            return
        made = self.chain(session)
        end = rng.randrange(1, CHAIN_BLOCKS + 1)
        begin = rng.randrange(end) if rng.random() < 0.2 else 0
        quality = rng.choice(QUALITIES)
        held = await self.publish_range(session, made, range(begin, end), quality)
        if held is not None and begin == 0 and len(held.blocks) == end:
            await self.anybody_sees(held, made, quality)

    async def publish_range(
        self,
        session: StoreSession,
        made: KeyChain,
        which: range,
        quality: Quality,
        truth: Quality | None = None,
        foreign: bool = False,
    ) -> Held | None:
        """What is held of it, if anything is. `truth`: the quality its bytes are of, if another."""
        name, steps = self.name, self.world.witness
        writing = self.world.writings.new(
            name, session.namespace, session.epoch, truth or quality, foreign=foreign
        )
        blocks = [
            PublishBlock(
                made.keys[i], made.parent(i), i, made.placement(i), memoryview(writing.payload(made.keys[i]))
            )
            for i in which
        ]
        pin_for_s = LEASE_S if self.world.rng.random() < 0.7 else None
        since, asked, crashes = steps.step(), self.world.now(), self.world.crashes()
        done = await session.publish(
            blocks,
            quality=quality,
            owner=f"{name}#{writing.number}",
            pin_for_s=pin_for_s,
            timeout_s=TIMEOUT_S,
        )
        if [b.key for b in done.blocks if isinstance(b, PinnedBlock)] != [
            block.key for block, b in zip(blocks, done.blocks, strict=True) if isinstance(b, PinnedBlock)
        ]:
            raise Broken(f"offered {blocks}, answered {done.blocks}")
        landed = tuple(block for block in done.blocks if isinstance(block, PinnedBlock))
        refused = [block for block in done.blocks if not isinstance(block, PinnedBlock)]
        if Refusal.QUOTA in refused and self.tenant not in self.world.quotas:
            raise Broken(f"{self.tenant} has no quota, and is over it")
        self.count("refused", [refusal.value for refusal in refused])
        if not (landed and done.leases):
            return None
        return self.keep(session, landed, done.leases, since, asked, crashes)

    async def anybody_sees(self, held: Held, made: KeyChain, quality: Quality) -> None:
        """Acknowledged and pinned means that every later match sees it, unless it was deleted."""
        session = held.session
        if quality < session.min_quality:
            return
        keys, epoch = made.keys[: len(held.blocks)], session.epoch.number
        found = await session.match(keys, owner=self.name, lease_s=LEASE_S, timeout_s=TIMEOUT_S)
        shards = {block.ref.shard for block in held.blocks}
        deleted = self.world.witness.may_be_deleted(shards, session.namespace, keys, epoch, held.since)
        # What the disk broke is retired by whoever finds it, a mover too: then it may be absent.
        broken = any(self.world.hosts[shard].driver.core.counters["retired_corrupt"] for shard in shards)
        if broken and not self.world.storage_broken:
            raise Broken(f"retired as corrupt on {shards}, whose storage never broke a byte")
        if self.sure(held) and not (deleted or broken) and found.miss not in (None, *EXCUSES):
            raise Broken(f"acknowledged, pinned, and not seen: block {len(found.blocks)} is {found.miss}")
        await session.release(found.leases)

    async def match_and_read(self) -> None:
        rng, session = self.world.rng, await self.session()
        if session is None:
            return
        held = await self.match(session, self.chain(session).keys[: rng.randrange(1, CHAIN_BLOCKS + 1)])
        if held is not None and rng.random() < 0.8:
            await self.read(held)

    async def match(self, session: StoreSession, keys: list[BlockKey]) -> Held | None:
        since, asked, crashes = self.world.witness.step(), self.world.now(), self.world.crashes()
        found = await session.match(keys, owner=self.name, lease_s=LEASE_S, timeout_s=TIMEOUT_S)
        self.count("match", [found.miss.value] if found.miss else [])
        self.world.report.blocks_matched += len(found.blocks)
        if not found.blocks:
            return None
        return self.keep(session, tuple(found.blocks), found.leases, since, asked, crashes)

    async def read_held(self) -> None:
        """Perhaps long after the lease ended: a stale reference must be a miss."""
        past = [held for held in self.held if not self.sure(held)]
        if past and self.world.rng.random() < 0.6:
            await self.read(self.world.rng.choice(past))
        elif self.held:
            await self.read(self.world.rng.choice(self.held))

    async def read(self, held: Held, *, whole: bool = False) -> None:
        whole = whole or self.world.rng.random() < 0.8
        try:
            items = held.session.read(held.blocks, timeout_s=TIMEOUT_S)
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
        if await held.session.renew(held.leases, LEASE_S):
            held.sure_until = max(held.sure_until, asked + SURE * LEASE_S)

    async def let_go(self) -> None:
        if self.held:
            held = self.held.pop(self.world.rng.randrange(len(self.held)))
            released = Held(held.session, held.blocks, (), held.since, 0.0, held.crashes, held.writings)
            await held.session.release(held.leases)
            if self.world.rng.random() < 0.5:
                self.held.append(released)  # to be read all the same

    async def idle(self) -> None:
        await asyncio.sleep(self.world.rng.uniform(0.0, 1.5 * LEASE_S))

    # -- what must hold ----------------------------------------------------------------------------

    def check(self, held: Held, index: int, item: VerifiedBlock | BlockMiss) -> None:
        pinned, report, session = held.blocks[index], self.world.report, held.session
        if item.index != index:
            raise Broken(f"item {item.index} came as the {index}th")
        if isinstance(item, BlockMiss):
            report.reasons[f"read:{item.reason.value}"] += 1
            if self.world.storage_broken:
                return
            if item.reason in WRONG_BYTES:
                raise Broken(f"a shard gave out bytes that are {item.reason} for {pinned}")
            if item.reason is MissReason.LOW_QUALITY and pinned.quality < session.min_quality:
                return  # it published what it would not read
            if self.sure(held, pinned.ref.shard) and item.reason not in EXCUSES:
                raise Broken(
                    f"pinned for another {held.sure_until - self.world.now():.2f} s, yet {item.reason}"
                )
            return
        report.blocks_read += 1
        if item.epoch != pinned.epoch and not self.world.storage_broken:  # then it may be the key's next best
            raise Broken(f"promised epoch {pinned.epoch.number}, got {item.epoch.number}")
        writing = self.world.writings.origin(
            item.payload, session.namespace, pinned.key, item.epoch, item.quality
        )
        held.qualities[index] = item.quality
        was = held.writings.setdefault(index, writing)
        if was is not writing and not self.world.storage_broken:
            raise Broken(f"{pinned} was {was}, and is {writing} now")
        self.check_not_purged(pinned, session.namespace, writing, held.since)

    def check_not_purged(
        self, pinned: PinnedBlock, namespace: NamespaceId, writing: Writing, since: int
    ) -> None:
        """No match begun after an acknowledged purge finds what was begun before it, whatever crashed in
        between."""
        shard, begun = pinned.ref.shard, self.world.witness.begun
        for purge in self.world.history.purges:
            if purge.shard == shard and purge.acked < since:
                if not covers(purge.scope, namespace, pinned.key, pinned.epoch.number):
                    continue
                if begun.get((shard, writing.number), 0) < purge.served:
                    raise Broken(f"purged and acknowledged, and matched since: {writing}")

    def sure(self, held: Held, shard: ShardId | None = None) -> bool:
        """Is it certain that the shards still hold this for us?"""
        shards = {block.ref.shard for block in held.blocks} if shard is None else {shard}
        crashes = self.world.crashes()
        return self.world.now() < held.sure_until and all(crashes[s] == held.crashes[s] for s in shards)

    # -- inside ------------------------------------------------------------------------------------

    async def session(self) -> StoreSession | None:
        """Of the newest epoch, or at times of an older one that is still served."""
        rng = self.world.rng
        number = self.world.epoch if rng.random() < 0.8 else max(1, self.world.epoch - rng.choice((1, 1, 2)))
        if number not in self.sessions:
            least = rng.choice((Quality.LOSSLESS, Quality.INT8, Quality.INT8))
            try:
                self.sessions[number] = await self.store.open(
                    SPEC,
                    epoch(number),
                    tenant=self.tenant,
                    min_quality=least,
                    stale_lag_max=rng.choice((0, 1, 2)),
                )
            except KVStrataError as error:
                self.world.report.reasons[f"open:{type(error).__name__}"] += 1
                return None
        return self.sessions[number]

    def chain(self, session: StoreSession) -> KeyChain:
        return self.world.chain(session.namespace, self.world.rng.choice(CHAINS))

    def keep(
        self,
        session: StoreSession,
        blocks: tuple[PinnedBlock, ...],
        leases: Leases,
        since: int,
        asked: float,
        crashes: dict[ShardId, int],
    ) -> Held:
        held = Held(session, blocks, leases, since, asked + SURE * LEASE_S, crashes)
        self.held.append(held)
        return held

    def count(self, what: str, reasons: list[str]) -> None:
        self.world.report.reasons.update(f"{what}:{reason}" for reason in reasons)


Deed = Callable[[Client], Awaitable[None]]
