"""Onboarding's promises: a bounded wait, and only a contiguous, verified prefix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from engine.background import Background
from engine.onboard import Onboarding, misses_of
from engine.parallel.session import Session
from engine.store_link import StoreLink
from kvstore import failpoints
from kvstore.answers import Match, PublishBlock
from kvstore.clock import MonotonicClock
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import Epoch, KVLayout, MissReason, NamespaceSpec, Quality, WeightsDigest
from kvstore.topology import Topology
from tests.gates import GatedShard
from tests.role_parts import WAIT_S, over

LAYOUT = KVLayout(1, 0, 1, 4, "float32", block_tokens=4)
EPOCH = Epoch(1, WeightsDigest(b"weights of a day"))
BLOCKS = 6


@dataclass
class Scene:
    shard: GatedShard
    session: Session
    onboarding: Onboarding
    background: Background
    chain: KeyChain

    async def match(self) -> Match:
        return await self.onboarding.match(
            self.session, self.chain.keys, owner="me", lease_s=60.0, timeout_s=WAIT_S
        )


def payload(index: int) -> memoryview:
    return memoryview(bytes([index]) * LAYOUT.block_nbytes)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    """A store that holds all BLOCKS blocks of one chain."""
    driver, background = GatedShard(), Background()
    spec = NamespaceSpec("m", LAYOUT, bytes(16))
    link = StoreLink(over([driver]), Topology(0, ()), spec, EPOCH, background, MonotonicClock())
    session = await link.session("default")
    assert session is not None
    chain = KeyChain(session.namespace, LAYOUT.block_tokens)
    chain.extend(range(BLOCKS * LAYOUT.block_tokens))
    blocks = [
        PublishBlock(key, chain.parent(i), i, chain.placement(i), payload(i))
        for i, key in enumerate(chain.keys)
    ]
    quality = Quality.LOSSLESS
    await session.publish(blocks, quality=quality, owner="others", pin_for_s=None, timeout_s=WAIT_S)
    yield Scene(driver, session, Onboarding(link, background), background, chain)
    driver.gate.open()
    await background.settle(WAIT_S)
    await link.close()


async def test_all_that_is_there_comes_verified_and_in_order(scene: Scene) -> None:
    match = await scene.match()
    read = await scene.onboarding.read(scene.session, match.blocks, Lineage(EPOCH), timeout_s=WAIT_S)
    assert read.payloads == [payload(i) for i in range(BLOCKS)]
    assert (read.miss, read.epochs, read.lineage) == (None, {1}, Lineage(EPOCH))


async def test_what_does_not_arrive_in_time_is_left_behind(scene: Scene) -> None:
    match = await scene.match()
    scene.shard.gate.at = "read after"  # the first block came, the shard stands still
    read = await scene.onboarding.read(scene.session, match.blocks, Lineage(EPOCH), timeout_s=0.05)
    assert (len(read.payloads), read.miss) == (1, MissReason.DEADLINE)


async def test_a_corrupt_block_ends_the_prefix(scene: Scene) -> None:
    match = await scene.match()
    with failpoints.armed("storage.read", failpoints.Effect.CORRUPT, after=2):
        read = await scene.onboarding.read(scene.session, match.blocks, Lineage(EPOCH), timeout_s=WAIT_S)
    assert (len(read.payloads), read.miss) == (2, MissReason.CHECKSUM)


async def test_a_store_that_fails_outright_is_a_miss(scene: Scene) -> None:
    match = await scene.match()
    await scene.shard.close()
    read = await scene.onboarding.read(scene.session, match.blocks, Lineage(EPOCH), timeout_s=WAIT_S)
    assert (read.payloads, read.miss) == ([], MissReason.SHARD_UNAVAILABLE)
    again = await scene.match()
    assert (again.blocks, again.miss) == ((), MissReason.SHARD_UNAVAILABLE)


async def test_a_match_given_up_while_it_is_answered_leaves_no_lease(scene: Scene) -> None:
    scene.shard.gate.at = "match after"
    matching = asyncio.create_task(scene.match())
    await scene.shard.gate.reached()
    assert scene.shard.core.leases == 1
    matching.cancel()
    scene.shard.gate.open()
    with pytest.raises(asyncio.CancelledError):
        await matching
    assert await scene.background.settle(WAIT_S)
    assert scene.shard.core.leases == 0


@pytest.mark.parametrize(
    ("asked", "matched", "used", "match", "read", "expected"),
    [
        (0, 0, 0, None, None, {}),
        (10, 10, 10, None, None, {}),
        (10, 7, 7, MissReason.ABSENT, None, {"absent": 3}),
        (10, 7, 5, MissReason.ABSENT, MissReason.CHECKSUM, {"absent": 3, "checksum": 2}),
        (10, 0, 0, MissReason.SHARD_UNAVAILABLE, None, {"shard_unavailable": 10}),
    ],
)
def test_every_block_asked_for_is_used_or_a_miss_with_a_reason(
    asked: int,
    matched: int,
    used: int,
    match: MissReason | None,
    read: MissReason | None,
    expected: dict[str, int],
) -> None:
    misses = misses_of(asked, matched, used, match, read)
    assert misses == expected
    assert used + misses.total() == asked
